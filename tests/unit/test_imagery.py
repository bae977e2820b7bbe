"""Images of any CRS, resolution, band count and nodata land on the grid, within a pixel."""

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from scipy import ndimage

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.grid import Grid
from roadfuse_core.imagery import ImageryReader, identify
from roadfuse_core.labels import open_map
from roadfuse_core.settings import City, ImagerySpec, MapSpec

GRID = Grid("EPSG:32633", 1.0, 64, 6250, 82_000, 4, 4)
PLACE = (100, 60)  # row and column of a bright square of 9 px


def scene(crs: str, step: float):
    """A dark image with one bright square at PLACE, drawn in another CRS, by PROJ alone."""
    b = GRID.bounds
    to = Transformer.from_crs(GRID.crs, crs, always_xy=True)
    left, bottom, right, top = to.transform_bounds(b.left - 40, b.bottom - 40, b.right + 40, b.top + 40)
    width, height = int((right - left) / step), int((top - bottom) / step)
    transform = from_origin(left, top, step, step)
    cols, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = Transformer.from_crs(crs, GRID.crs, always_xy=True).transform(*(transform @ (cols, rows)))
    col, row = x - b.left, b.top - y
    bright = (np.abs(row - PLACE[0] - 0.5) <= 4.5) & (np.abs(col - PLACE[1] - 0.5) <= 4.5)
    return np.where(bright, 250, 20), transform


def write(path, values, transform, crs, bands=3, dtype="uint8", nodata=None, **tags):
    with rasterio.open(path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=bands, dtype=dtype,
                       crs=crs, transform=transform, nodata=nodata) as dst:  # fmt: skip
        for k in range(bands):
            dst.write(values.astype(dtype), k + 1)
        dst.update_tags(**tags)
    return str(path)


@pytest.mark.parametrize(
    ("crs", "step"), [("EPSG:32633", 0.3), ("EPSG:32632", 1.0), ("EPSG:4326", 5e-6), ("EPSG:3857", 0.7), ("EPSG:3035", 0.5)]
)
def test_a_landmark_is_where_proj_puts_it(tmp_path, crs, step):
    path = write(tmp_path / "a.tif", *scene(crs, step), crs)
    rgb, valid = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID).window(0, 0, 256, 256)
    assert valid.all()
    rows, cols = np.nonzero(rgb[0] > 135)
    assert abs(rows.mean() - PLACE[0]) < 0.5
    assert abs(cols.mean() - PLACE[1]) < 0.5
    assert 60 <= len(rows) <= 105


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_bands(tmp_path, bands):
    path = write(tmp_path / "a.tif", *scene("EPSG:32633", 1.0), "EPSG:32633", bands)
    rgb, _ = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID).window(90, 50, 20, 20)
    assert rgb.shape == (3, 20, 20)
    assert np.array_equal(rgb[0], rgb[2])
    assert rgb[1, 10, 10] == 250


STEPS = pytest.mark.parametrize("step", [1.0, 0.5], ids=["on the grid's pixels", "warped"])


@STEPS
def test_bands_that_are_named_are_shown_in_their_order(tmp_path, step):
    """As satellites deliver them: blue, green, red, infrared."""
    values, transform = scene("EPSG:32633", step)
    path = write(tmp_path / "a.tif", values, transform, "EPSG:32633", 4)
    with rasterio.open(path, "r+") as dst:
        dst.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
        for number, factor in ((1, 0.2), (2, 0.4), (3, 0.8)):
            dst.write((values * factor).astype("uint8"), number)
    rgb, valid = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID).window(90, 50, 20, 20)
    assert valid.all()
    assert rgb[:, 10, 10].tolist() == [200, 100, 50]


@STEPS
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_values_of_a_palette_are_colours(tmp_path, step, dtype):
    values, transform = scene("EPSG:32633", step)
    path = str(tmp_path / "a.tif")
    height, width = values.shape
    with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=1, dtype=dtype, crs="EPSG:32633",
                       transform=transform, photometric="palette") as dst:  # fmt: skip
        dst.write(np.where(values > 135, 1, 2).astype(dtype), 1)
        dst.write_colormap(1, {1: (250, 240, 230), 2: (10, 60, 20)})
    rgb, valid = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID).window(90, 50, 20, 20)
    assert valid.all()
    assert rgb[:, 10, 10].tolist() == [250, 240, 230]
    assert {tuple(c) for c in rgb.reshape(3, -1).T.tolist()} == {(250, 240, 230), (10, 60, 20)}, "and none between them"


def test_windows_agree_and_past_the_image_nothing_is_known(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (100, 100))
    b = GRID.bounds
    path = write(tmp_path / "a.tif", values, from_origin(b.left + 20, b.top - 30, 1, 1), "EPSG:32633")
    reader = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID)
    whole, known = reader.window(-16, -16, 256, 256)
    assert np.array_equal(np.argwhere(known).min(0), [46, 36])
    assert known.sum() == 100 * 100
    assert not whole[:, ~known].any()
    part, part_known = reader.window(40, 40, 64, 64)
    assert np.array_equal(part, whole[:, 56:120, 56:120])
    assert np.array_equal(part_known, known[56:120, 56:120])


def test_nodata_of_the_file_and_of_the_setting(tmp_path):
    values = np.full((256, 256), 77)
    values[:, :100] = 255
    origin = from_origin(GRID.bounds.left, GRID.bounds.top, 1, 1)
    stated = write(tmp_path / "a.tif", values, origin, "EPSG:32633", nodata=255)
    silent = write(tmp_path / "b.tif", values, origin, "EPSG:32633")
    for path, nodata in ((stated, None), (silent, 255)):
        _, known = ImageryReader(ImagerySpec(sources=("a",), nodata=nodata), [path], GRID).window(0, 0, 256, 256)
        assert not known[:, :99].any()
        assert known[:, 101:].all()


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_floats_that_are_no_numbers_are_unknown(tmp_path, step):
    values = np.full((300, 300), 5.0)
    values[100:120, 40:60] = np.nan
    at = from_origin(GRID.bounds.left, GRID.bounds.top, step, step)
    path = write(tmp_path / "a.tif", values, at, GRID.crs, bands=1, dtype="float32")
    rgb, valid = ImageryReader(ImagerySpec(sources=("a",), value_range=(0, 10)), [path], GRID).window(0, 0, 150, 150)
    hole = np.zeros((150, 150), bool)
    hole[tuple(slice(int(a * step), int(b * step)) for a, b in ((100, 120), (40, 60)))] = True
    assert not valid[hole].any()
    assert valid[~ndimage.binary_dilation(hole, iterations=2)].all()
    assert set(np.unique(rgb[:, valid])) <= {127, 128}


def test_the_first_image_wins_and_the_second_fills(tmp_path):
    b = GRID.bounds
    one = write(tmp_path / "a.tif", np.full((256, 128), 10), from_origin(b.left, b.top, 1, 1), "EPSG:32633")
    two = write(tmp_path / "b.tif", np.full((256, 256), 90), from_origin(b.left, b.top, 1, 1), "EPSG:32633")
    rgb, known = ImageryReader(ImagerySpec(sources=("a",)), [one, two], GRID).window(0, 0, 256, 256)
    assert known.all()
    assert (rgb[0, :, :127] == 10).all()
    assert (rgb[0, :, 129:] == 90).all()


def test_sixteen_bits_need_a_range(tmp_path):
    path = write(
        tmp_path / "a.tif",
        np.full((256, 256), 1500),
        from_origin(GRID.bounds.left, GRID.bounds.top, 1, 1),
        "EPSG:32633",
        dtype="uint16",
    )
    with pytest.raises(ConfigError, match=r"imagery\.value_range.*uint16.*for example"):
        ImageryReader(ImagerySpec(sources=("a",)), [path], GRID)
    rgb, _ = ImageryReader(ImagerySpec(sources=("a",), value_range=(0, 3000)), [path], GRID).window(0, 0, 8, 8)
    assert (rgb == 128).all()


def test_a_picture_without_a_crs_or_that_is_none(tmp_path):
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=8, width=8, count=3, dtype="uint8",
                       transform=from_origin(GRID.bounds.left, GRID.bounds.top, 1, 1)) as dst:  # fmt: skip
        dst.write(np.ones((3, 8, 8), np.uint8))
    with pytest.raises(ConfigError, match=r"has no CRS; state it as imagery\.crs"):
        ImageryReader(ImagerySpec(sources=("a",)), [str(tmp_path / "a.tif")], GRID)
    assert ImageryReader(ImagerySpec(sources=("a",), crs="EPSG:32633"), [str(tmp_path / "a.tif")], GRID).covers()
    (tmp_path / "b.tif").write_bytes(b"II*\0 no more")
    with pytest.raises(DataError, match="not a readable raster"):
        ImageryReader(ImagerySpec(sources=("a",)), [str(tmp_path / "b.tif")], GRID)


def test_the_identity_changes_with_the_file(tmp_path):
    path = write(tmp_path / "a.tif", *scene("EPSG:32633", 1.0), "EPSG:32633")
    before = identify([path])
    assert identify([path]) == before
    write(tmp_path / "a.tif", *scene("EPSG:32633", 0.9), "EPSG:32633")
    assert identify([path]) != before


def test_lines_are_drawn_at_their_width_and_known_inside_their_hull(tmp_path):
    import geopandas as gpd
    from shapely.geometry import LineString

    b = GRID.bounds
    lines = [
        LineString([(b.left + 10, b.top - 50), (b.left + 240, b.top - 50)]),
        LineString([(b.left + 128, b.top - 20), (b.left + 128, b.top - 200)]),
    ]
    table = gpd.GeoDataFrame({"wide": [8.0, 20.0]}, geometry=lines, crs=GRID.crs).to_crs(4326)
    table.to_file(tmp_path / "r.gpkg")
    city = City(name="c", workspace="w", grid={"bounds": (13, 47, 13.1, 47.1)}, imagery={"sources": ["x"]}, root=tmp_path)
    road, known = open_map(city, MapSpec(path="r.gpkg", width_m=8), "labels.roads", GRID).window(0, 0, 256, 256)
    assert 7 <= road[:, 60].sum() <= 9
    assert 7 <= road[150].sum() <= 9
    assert known[100, 128]
    assert not known[250, 5]
    wide, _ = open_map(city, MapSpec(path="r.gpkg", width="wide"), "labels.roads", GRID).window(0, 0, 256, 256)
    assert 19 <= wide[150].sum() <= 21
    with pytest.raises(ConfigError, match=r"labels\.roads\.width: 'lanes' is not a column"):
        open_map(city, MapSpec(path="r.gpkg", width="lanes"), "labels.roads", GRID)
    with pytest.raises(ConfigError, match="does not exist"):
        open_map(city, MapSpec(path="none.gpkg"), "labels.roads", GRID)


def test_areas_are_drawn_as_they_are_where_there_is_no_line(tmp_path):
    import geopandas as gpd
    from shapely.geometry import LineString, Point, box

    b = GRID.bounds
    city = City(name="c", workspace="w", grid={"bounds": (13, 47, 13.1, 47.1)}, imagery={"sources": ["x"]}, root=tmp_path)
    areas = [box(b.left + 10, b.top - 60, b.left + 200, b.top - 50), box(b.left + 100, b.top - 200, b.left + 120, b.top - 20)]
    gpd.GeoDataFrame(geometry=[*areas, Point(b.left, b.top)], crs=GRID.crs).to_file(tmp_path / "areas.gpkg")
    road, known = open_map(city, MapSpec(path="areas.gpkg"), "x", GRID).window(0, 0, 256, 256)
    assert road.sum() == 190 * 10 + 20 * 180 - 20 * 10
    assert known[55, 150]
    assert not known[250, 5]
    gpd.GeoDataFrame(geometry=[areas[0], LineString([(b.left, b.top - 100), (b.right, b.top - 100)])],
                     crs=GRID.crs).to_file(tmp_path / "both.gpkg")  # fmt: skip
    road, _ = open_map(city, MapSpec(path="both.gpkg", width_m=4), "x", GRID).window(0, 0, 256, 256)
    assert np.nonzero(road.any(1))[0].tolist() == [98, 99, 100, 101], "where there are lines, areas are something else"
    gpd.GeoDataFrame(geometry=[Point(b.left, b.top)], crs=GRID.crs).to_file(tmp_path / "points.gpkg")
    with pytest.raises(DataError, match="holds neither lines nor areas"):
        open_map(city, MapSpec(path="points.gpkg"), "x", GRID)


def test_pixel_is_point_and_an_old_datum(real_data):
    """NAD27 and pixel-is-point: roads of the map must lie darker or lighter than their surroundings only after the shift."""
    path = str(real_data / "chicago/6_UTM2GTIF.TIF")
    grid = Grid("EPSG:32616", 10.0, 64, 690, 7240, 12, 12)
    reader = ImageryReader(ImagerySpec(sources=("a",)), [path], grid)
    with rasterio.open(path) as source:
        corner = Transformer.from_crs(source.crs, grid.crs, always_xy=True).transform(source.bounds.left, source.bounds.top)
        plain = (source.bounds.left, source.bounds.top)
    # The datum shift is about 215 m; that of pixel-is-point half a pixel.
    assert 150 < np.hypot(corner[0] - plain[0], corner[1] - plain[1]) < 280
    assert abs(reader.files[0][1].left - corner[0]) < 10
    assert abs(reader.files[0][1].top - corner[1]) < 10


def test_a_pixel_does_not_depend_on_the_rectangle_and_aligned_files_are_not_warped(tmp_path):
    """Degrees warped onto the grid in any pieces; and the fast way of files on the grid's own pixels against the warp."""
    rng, b = np.random.default_rng(0), GRID.bounds
    values = rng.integers(0, 255, (700, 900))
    west, south = Transformer.from_crs(GRID.crs, 4326, always_xy=True).transform(b.left - 100, b.top - 500)
    path = write(tmp_path / "deg.tif", values, from_origin(west, south + 700e-5, 1e-5, 1e-5), "EPSG:4326")
    reader = ImageryReader(ImagerySpec(sources=("a",)), [path], GRID)
    rgb, known = reader.window(-64, -64, 400, 380)
    assert known.any()
    for row, col, height, width in ((-64, -64, 31, 200), (10, 3, 300, 33), (100, 200, 150, 100)):
        part, seen = reader.window(row, col, height, width)
        at = (slice(row + 64, row + 64 + height), slice(col + 64, col + 64 + width))
        assert np.array_equal(part, rgb[:, at[0], at[1]])
        assert np.array_equal(seen, known[at])
    aligned = write(tmp_path / "own.tif", values, from_origin(b.left - 20, b.top + 30, 1, 1), "EPSG:32633")
    reader = ImageryReader(ImagerySpec(sources=("a",)), [aligned], GRID)
    fast = reader.window(-40, -30, 300, 290)
    reader._corner = lambda raster: None
    plain = reader.window(-40, -30, 300, 290)
    assert all(np.array_equal(a, b) for a, b in zip(fast, plain, strict=True))
