"""Rasters of every type, layout and file format lie where they belong, and are known where they hold data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio import shutil as rasterio_shutil
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp

from roadfuse_core.check import check_city
from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.grid import Grid
from roadfuse_core.imagery import ImageryReader, find_imagery
from roadfuse_core.labels import open_map
from roadfuse_core.settings import City, ImagerySpec, InvalidCityError, MapSpec

GRID = Grid("EPSG:32633", 1.0, 64, 6250, 82_000, 4, 4)
LEFT, TOP = GRID.bounds.left, GRID.bounds.top
HEIGHT, WIDTH = 101, 77
TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
# Off the grid's pixels by a third, so that the file is warped; the nearest pixel is known to within one.
PLACES = pytest.mark.parametrize("shift", [0.0, 1 / 3], ids=["on the grid's pixels", "warped"])


def write(path, bands, place, alpha=None, colours=None, **more):
    """Bands (n, H, W); `alpha` is a last band of transparency; four or more bytes a pixel are no transparency by themselves."""
    stack = bands if alpha is None else np.concatenate([bands, alpha[None].astype(bands.dtype)])
    more = {"driver": "GTiff", "crs": GRID.crs} | more
    if more["driver"] == "GTiff" and alpha is None and len(stack) > 3:
        more |= {"photometric": "RGB", "alpha": "unspecified"}
    with rasterio.open(path, "w", height=stack.shape[1], width=stack.shape[2], count=len(stack), dtype=stack.dtype, transform=place,
                       **more) as dst:  # fmt: skip
        if alpha is not None:
            plain = (
                [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
                if len(bands) == 3
                else [ColorInterp.undefined] * len(bands)
            )
            dst.colorinterp = [*plain, ColorInterp.alpha]
        dst.write(stack)
        for name, value in (colours or {}).items():
            dst.write_colormap(1, {int(name): value})
    return str(path)


def virtual(bands, place, height=HEIGHT, width=WIDTH):
    """A virtual raster of bands (more XML, source, number of its band)."""
    text = "".join(
        f'<VRTRasterBand dataType="Byte" band="{k}">{more}<SimpleSource><SourceFilename relativeToVRT="{int(not source.startswith("/"))}">'
        f"{source}</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for k, (more, source, band) in enumerate(bands, 1)
    )
    affine = ", ".join(map(str, place.to_gdal()))
    size = f'rasterXSize="{width}" rasterYSize="{height}"'
    return f"<VRTDataset {size}><SRS>{GRID.crs}</SRS><GeoTransform>{affine}</GeoTransform>{text}</VRTDataset>"


def at(row, col):
    return Affine(1, 0, LEFT + col, 0, -1, TOP - row)


def read(paths, **spec):
    spec = {"sources": ("a",)} | spec
    return ImageryReader(ImagerySpec(**spec), [str(p) for p in paths], GRID).window(0, 0, 256, 256)


def label(path, **spec):
    city = City(name="c", workspace="w", grid={"bounds": (13, 47, 13.1, 47.1)}, imagery={"sources": ["x"]})
    return open_map(city, MapSpec(path=str(path), **spec), "labels.roads", GRID).window(0, 0, 256, 256)


def rectangle(row, col, height=HEIGHT, width=WIDTH):
    out = np.zeros((256, 256), bool)
    out[row : row + height, col : col + width] = True
    return out


def edge(mask):
    """Pixels within one of a mask's rim."""
    around = np.zeros_like(mask)
    for shift in (-1, 1):
        around |= np.roll(mask, shift, 0) ^ mask
        around |= np.roll(mask, shift, 1) ^ mask
    return around


def assert_near(found, expected):
    assert not ((found != expected) & ~edge(expected)).any(), (found.sum(), expected.sum())


@PLACES
@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_mask_of_labels_is_known_where_its_file_lies(tmp_path, dtype, bands, shift):
    road = np.zeros((bands, HEIGHT, WIDTH), dtype)
    road[:, 40:48] = 1
    path = write(tmp_path / "a.tif", road, at(30 + shift, 50 + shift))
    drawn, known = label(path)
    assert_near(known, rectangle(30, 50))
    assert_near(drawn, rectangle(70, 50, 8))


@PLACES
@pytest.mark.parametrize("bands", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", TYPES)
def test_of_adjoining_sheets_none_claims_what_another_holds(tmp_path, dtype, bands, shift):
    """Red, green, blue and near infrared, without transparency, as NAIP is delivered; in every type."""
    one = write(tmp_path / "a.tif", np.full((bands, HEIGHT, WIDTH), 40, dtype), at(30 + shift, 50 + shift))
    two = write(tmp_path / "b.tif", np.full((bands, HEIGHT, WIDTH), 90, dtype), at(30 + shift, 50 + WIDTH + shift))
    rgb, known = read([one, two], value_range=(0, 255))
    assert_near(known, rectangle(30, 50, width=2 * WIDTH))
    assert (rgb[:, 60, 60] == 40).all()
    assert (rgb[:, 60, 50 + WIDTH + 20] == 90).all()
    assert not rgb[:, ~known].any()


@pytest.mark.parametrize("opaque", [1, "greatest"])
@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_transparency_is_nothing_or_anything(tmp_path, dtype, bands, opaque):
    """Some write 0 and 1, some 0 and the greatest value of the type."""
    high = opaque if opaque == 1 or dtype == "float32" else np.iinfo(dtype).max
    alpha = np.zeros((HEIGHT, WIDTH))
    alpha[:50] = 1 if high == "greatest" else high
    path = write(tmp_path / "a.tif", np.full((bands, HEIGHT, WIDTH), 40, dtype), at(30, 50), alpha)
    rgb, known = read([path], value_range=(0, 255))
    assert_near(known, rectangle(30, 50, 50))
    assert (rgb[:, known] == 40).all()
    road, seen = label(path)
    assert_near(road, rectangle(30, 50, 50))
    assert_near(seen, rectangle(30, 50, 50))


TURNS = {
    "north up": Affine.identity(),
    "south up": Affine(1, 0, 0, 0, -1, HEIGHT),
    "east left": Affine(-1, 0, WIDTH, 0, 1, 0),
    "turned by half": Affine(-1, 0, WIDTH, 0, -1, HEIGHT),
    "rows are columns": Affine(0, 1, 0, 1, 0, 0),
}


@pytest.mark.parametrize("turn", TURNS)
def test_rows_and_columns_run_either_way(tmp_path, turn):
    values = np.random.default_rng(0).integers(1, 255, (3, HEIGHT, WIDTH), dtype=np.uint8)
    cols, rows = np.meshgrid(
        np.arange(HEIGHT if turn.startswith("rows") else WIDTH), np.arange(WIDTH if turn.startswith("rows") else HEIGHT)
    )
    x, y = TURNS[turn] @ (cols + 0.5, rows + 0.5)
    path = write(tmp_path / "a.tif", values[:, y.astype(int), x.astype(int)], at(30, 50) @ TURNS[turn])
    rgb, known = read([path])
    assert np.array_equal(known, rectangle(30, 50))
    assert np.array_equal(rgb[:, 30 : 30 + HEIGHT, 50 : 50 + WIDTH], values)
    drawn, seen = label(path)
    assert np.array_equal(seen, known)
    assert drawn.sum() == HEIGHT * WIDTH
    small, _ = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID).window(64, 64, 40, 30)
    assert np.array_equal(small, rgb[:, 64:104, 64:94]), "windows smaller than the sheet"


def test_a_turned_sheet_is_read_in_its_corners_too(tmp_path):
    place = at(128, 128) @ Affine.rotation(33) @ Affine.translation(-WIDTH / 2, -HEIGHT / 2)
    path = write(tmp_path / "a.tif", np.full((3, HEIGHT, WIDTH), 40, np.uint8), place)
    reader = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID)
    _, known = reader.window(0, 0, 256, 256)
    assert abs(int(known.sum()) - HEIGHT * WIDTH) < 100
    parts = [reader.window(r, c, 16, 16)[1] for r in range(0, 256, 16) for c in range(0, 256, 16)]
    assert sum(int(p.sum()) for p in parts) == known.sum()


@pytest.mark.parametrize("missing", [(0, 0, 0), (0, 255, 7)], ids=["one value", "a value for each band"])
def test_a_pixel_is_missing_where_all_its_bands_are(tmp_path, missing):
    values = np.full((3, HEIGHT, WIDTH), 40, np.uint8)
    values[:, :20] = np.array(missing)[:, None, None]
    values[0, 20:30] = missing[0]  # one band alone is a colour
    write(tmp_path / "a.tif", values, at(30, 50))
    bands = [(f"<NoDataValue>{v}</NoDataValue>", "a.tif", b) for b, v in enumerate(missing, 1)]
    (tmp_path / "a.vrt").write_text(virtual(bands, at(30, 50)))
    _, known = read([tmp_path / "a.vrt"])
    assert_near(known, rectangle(50, 50, HEIGHT - 20))


def test_palettes_with_missing_values_and_clear_colours(tmp_path):
    values = np.full((1, HEIGHT, WIDTH), 3, np.uint8)
    values[:, :20], values[:, 20:40] = 1, 2
    colours = {1: (9, 9, 9, 255), 2: (8, 8, 8, 0), 3: (200, 100, 50, 255)}
    write(tmp_path / "a.tif", values, at(30, 50), colours=colours, nodata=1, photometric="palette")
    table = "".join(f'<Entry c1="{r}" c2="{g}" c3="{b}" c4="{a}"/>' for r, g, b, a in [(0, 0, 0, 255), *colours.values()])
    band = f"<NoDataValue>1</NoDataValue><ColorInterp>Palette</ColorInterp><ColorTable>{table}</ColorTable>"
    (tmp_path / "a.vrt").write_text(virtual([(band, "a.tif", 1)], at(30, 50)))
    for name, first in (("a.tif", 50), ("a.vrt", 70)):  # a TIFF keeps no opacity
        rgb, known = read([tmp_path / name])
        assert_near(known, rectangle(first, 50, HEIGHT + 30 - first))
        assert rgb[:, 100, 80].tolist() == [200, 100, 50]


@PLACES
def test_a_mask_beside_an_image_counts(tmp_path, shift):
    path = write(tmp_path / "a.tif", np.full((3, HEIGHT, WIDTH), 40, np.uint8), at(30 + shift, 50 + shift))
    with rasterio.open(path, "r+") as dst:
        dst.write_mask(np.arange(HEIGHT)[:, None].repeat(WIDTH, 1) < 50)
    _, known = read([path])
    assert_near(known, rectangle(30, 50, 50))


def test_floats_that_are_no_numbers_are_unknown_in_labels(tmp_path):
    values = np.ones((1, HEIGHT, WIDTH), np.float32)
    values[:, :50] = np.nan
    _, known = label(write(tmp_path / "a.tif", values, at(30, 50)))
    assert_near(known, rectangle(80, 50, HEIGHT - 50))


FORMATS = {
    "a.img": "HFA",
    "a.asc": "AAIGrid",
    "a.nc": "netCDF",
    "a.jp2": "JP2OpenJPEG",
    "a.png": "PNG",
    "a.bmp": "BMP",
    "a.gif": "GIF",
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_file_formats_are_read(tmp_path, name):
    values = np.zeros((1, HEIGHT, WIDTH), np.uint8)
    values[:, 40:48] = 1
    plain = write(tmp_path / "plain.tif", values, at(30, 50))
    more = (
        {"QUALITY": "100", "REVERSIBLE": "YES"}
        if name == "a.jp2"
        else {"WORLDFILE": "YES"}
        if name in ("a.png", "a.bmp", "a.gif")
        else {}
    )
    rasterio_shutil.copy(plain, tmp_path / name, driver=FORMATS[name], **more)
    (tmp_path / f"{name}.aux.xml").unlink(missing_ok=True)
    road, known = label(tmp_path / name, crs=GRID.crs)
    assert np.array_equal(road, rectangle(70, 50, 8))
    assert np.array_equal(known, rectangle(30, 50))
    rgb, seen = read([tmp_path / name], crs=GRID.crs, value_range=(0, 1))
    assert np.array_equal(seen, known)
    assert (rgb[:, road] > rgb[:, 80:81, 60]).all()


def scan(path, points, crs=GRID.crs):
    values = np.full((3, HEIGHT, WIDTH), 40, np.uint8)
    values[:, 20:30, 10:20] = 250
    with rasterio.open(path, "w", driver="GTiff", height=HEIGHT, width=WIDTH, count=3, dtype="uint8") as dst:
        dst.gcps = [GroundControlPoint(row=r, col=c, x=x, y=y) for r, c, x, y in points], rasterio.crs.CRS.from_string(crs)
        dst.write(values)
    return path


def corners(bend=0.0):
    rows_cols = [(0, 0), (0, WIDTH), (HEIGHT, 0), (HEIGHT, WIDTH), (HEIGHT / 2, WIDTH / 2)]
    return [(r, c, LEFT + 50 + c + bend * (r == HEIGHT / 2), TOP - 30 - r) for r, c in rows_cols]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_ground_control_points_place_a_scan(tmp_path):
    for stated in (None, GRID.crs):
        rgb, known = read([scan(tmp_path / "a.tif", corners())], crs=stated)
        assert np.array_equal(known, rectangle(30, 50))
        assert np.array_equal(rgb[0] == 250, rectangle(50, 60, 10, 10))
    with pytest.raises(ConfigError, match=r"imagery\.sources: .*a\.tif' has ground control points that bend it by .*gdalwarp"):
        read([scan(tmp_path / "a.tif", corners(bend=40))])
    with pytest.raises(ConfigError, match="has 2 ground control points, which do not place it; warp it by gdalwarp"):
        read([scan(tmp_path / "a.tif", corners()[:2])])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_picture_without_a_place_is_no_picture_elsewhere(tmp_path):
    with rasterio.open(tmp_path / "a.png", "w", driver="PNG", height=9, width=9, count=3, dtype="uint8") as dst:
        dst.write(np.ones((3, 9, 9), np.uint8))
    with pytest.raises(ConfigError, match=r"a\.png' does not say where it lies; give it a world file"):
        read([tmp_path / "a.png"], crs=GRID.crs)


def test_a_value_that_a_type_has_not_and_numbers_with_two_parts(tmp_path):
    path = write(tmp_path / "a.tif", np.ones((3, 9, 9), np.uint8), at(0, 0))
    with pytest.raises(ConfigError, match=r"imagery\.nodata: -9999\.0 is no value of uint8"):
        read([path], nodata=-9999)
    wave = write(tmp_path / "b.tif", np.ones((1, 9, 9), np.complex64), at(0, 0))
    with pytest.raises(DataError, match=r"b\.tif holds complex numbers"):
        read([wave], value_range=(0, 1))


def test_an_image_in_one_block_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    plain = {
        "driver": "GTiff",
        "height": 9001,
        "width": 9001,
        "count": 1,
        "dtype": "uint8",
        "crs": GRID.crs,
        "transform": at(0, 0),
    }
    for layout in ({"tiled": True, "blockxsize": 9008, "blockysize": 9008}, {"blockysize": 9001}):
        with rasterio.open(path, "w", compress="deflate", **plain, **layout) as dst:
            dst.write(np.zeros((1, 1, 9001), np.uint8), window=((0, 1), (0, 9001)))
        with pytest.raises(DataError, match=r"a\.tif is stored in blocks of 900\d × 900\d px.*gdal_translate -co TILED=YES"):
            read([path])
    (tmp_path / "b.vrt").write_text(virtual([("", "a.tif", 1)], at(0, 0), 9001, 9001))
    with pytest.raises(DataError, match=r"a\.tif is stored in blocks of 900"):
        read([tmp_path / "b.vrt"])


@PLACES
def test_a_damaged_image_is_named(tmp_path, shift):
    noise = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH), dtype=np.uint8)
    path = tmp_path / "a.tif"
    write(path, noise, at(30 + shift, 50 + shift), compress="deflate", tiled=True, blockxsize=16, blockysize=16)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3 : len(whole) // 2] = b"\xff" * (len(whole) // 2 - len(whole) // 3)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"^imagery\.sources: .*a\.tif is damaged \(.+\); copy it again$") as caught:
        read([path])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"^labels\.roads\.path: .*a\.tif is damaged"):
        label(path)


def test_a_file_that_is_lost_while_it_is_needed_is_named(tmp_path):
    path = write(tmp_path / "a.tif", np.ones((3, 9, 9), np.uint8), at(0, 0))
    reader = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID)
    shutil.move(path, tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"^imagery\.sources: .*a\.tif cannot be read \(No such file"):
        reader.window(0, 0, 9, 9)


def test_check_finds_a_south_up_sheet_inside(tmp_path):
    west, north = 13.0, 47.0
    grid = {"bounds": (west, north, west + 0.004, north + 0.003), "resolution_m": 1.0, "tile_px": 256}
    city = City(
        name="c", workspace="w", grid=grid, imagery={"sources": ["b.tif"]}, labels={"roads": {"path": "b.tif"}}, root=tmp_path
    )
    made = city.make_grid()
    place = Affine(1, 0, made.bounds.left + 40, 0, 1, made.bounds.bottom + 30)
    write(tmp_path / "b.tif", np.full((3, 150, 170), 40, np.uint8), place, crs=made.crs)
    assert "imagery: 1 files" in check_city(city)
    write(tmp_path / "b.tif", np.full((3, 150, 170), 40, np.uint8), place @ Affine.translation(0, -90_000), crs=made.crs)
    with pytest.raises(InvalidCityError, match=r"lies outside grid\.bounds"):
        check_city(city)


def test_images_are_found_in_folders_and_without_what_lies_beside_them(tmp_path):
    folder = tmp_path / "images [1]"
    (folder / "more/.hidden").mkdir(parents=True)
    sheets = [folder / "a.tif", folder / "more/b.TIF", folder / "more/.hidden/c.tif", folder / "d[2].tif"]
    for path in sheets:
        write(path, np.full((3, 100, 90), 40, np.uint8), at(0, 0))
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(sheets[0], "r+") as dst:
        dst.build_overviews([2, 4])
    with rasterio.open(sheets[0], "r+") as dst:
        dst.write_mask(True)
    (folder / "README.md").write_text("x")
    (folder / "a.tfw").write_text("1\n0\n0\n-1\n0\n0\n")
    assert (folder / "a.tif.ovr").is_file()

    def found(*sources):
        city = City(name="c", workspace="w", grid={"bounds": (13, 47, 13.1, 47.1)}, imagery={"sources": sources}, root=tmp_path)
        return [str(Path(p).relative_to(tmp_path)) for p in find_imagery(city)]

    every = ["images [1]/a.tif", "images [1]/d[2].tif", "images [1]/more/b.TIF"]
    assert found("images [1]") == every
    assert found("image*/*.tif*") == every[:2]
    assert found("image*/*.t*") == every[:2]
    assert found("images [1]/d[2].tif") == [every[1]]
    within = City(name="c", workspace="w", grid={"bounds": (13, 47, 13.1, 47.1)}, imagery={"sources": ["*.tif"]}, root=folder)
    assert find_imagery(within) == [str(folder / "a.tif"), str(folder / "d[2].tif")]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"imagery\.sources: 'nothing' matches no file"):
        found("nothing")
