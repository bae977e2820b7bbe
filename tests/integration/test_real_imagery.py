"""Real images with their traps: each is placed within a pixel, and where nothing is known no road is claimed."""

import zipfile

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image
from pyproj import Transformer
from rasterio.transform import from_origin
from scipy import ndimage

from roadfuse_core.imagery import ImageryReader, find_imagery
from roadfuse_core.inference import MapReader, infer
from roadfuse_core.mosaic import NODATA
from roadfuse_core.settings import load_city


def chicago(data, folder):
    """One band of 10 m in NAD27, pixel-is-point."""
    return data / "chicago/6_UTM2GTIF.TIF", {}, 10.0


def vegas(data, folder):
    """Pixels in degrees, whose sides differ in metres."""
    name = "apls/data/images/RGB-PanSharpen_AOI_2_Vegas_img0.tif"
    with zipfile.ZipFile(data / "spacenet_vegas/apls_vegas.zip") as archive:
        archive.extract(name, folder)
    with rasterio.open(folder / name) as source:
        assert source.crs.to_epsg() == 4326
        span = [0, 3000] if source.dtypes[0] != "uint8" else None
    return folder / name, {"value_range": span} if span else {}, 0.3


def massachusetts(data, folder):
    """Four bands, and blank white where there is no image."""
    rgb = np.asarray(Image.open(data / "massachusetts/images/19678630_15.png").convert("RGB"))
    path = folder / "four.tif"
    with rasterio.open(path, "w", driver="GTiff", height=rgb.shape[0], width=rgb.shape[1], count=4, dtype="uint8",
                       crs="EPSG:26986", transform=from_origin(217_000, 899_000, 1, 1)) as dst:  # fmt: skip
        dst.write(np.concatenate([rgb.transpose(2, 0, 1), rgb[None, :, :, 1]]))
        dst.colorinterp = [rasterio.enums.ColorInterp.red, rasterio.enums.ColorInterp.green, rasterio.enums.ColorInterp.blue,
                           rasterio.enums.ColorInterp.undefined]  # fmt: skip
    return path, {"nodata": 255}, 1.0


def open_city(source, settings, folder, resolution_m, reach_px=0):
    """A city over the image, or over its north-western corner and as far beyond it."""
    with rasterio.open(source) as s:
        to_lonlat = Transformer.from_crs(s.crs, 4326, always_xy=True)
        b = s.bounds
        size = 400 * abs(s.transform.a)
        west, south, east, north = (b.left - size / 2, b.top - size, b.left + size, b.top + size / 2) if reach_px else b
        box = to_lonlat.transform_bounds(west, south, east, north)
    raw = {
        "name": "image", "workspace": "work", "grid": {"bounds": list(box), "resolution_m": resolution_m, "tile_px": 256},
        "imagery": {"sources": [str(source)], **settings},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "city.yaml").write_text(yaml.safe_dump(raw))
    return load_city(folder / "city.yaml")


def by_proj(source, city, rows, cols):
    """The first band at pixel centres of the grid, by PROJ and bilinear interpolation; NaN outside."""
    grid = city.make_grid()
    x, y = grid.bounds.left + (cols + 0.5) * grid.resolution_m, grid.bounds.top - (rows + 0.5) * grid.resolution_m
    with rasterio.open(source) as s:
        east, north = Transformer.from_crs(grid.crs, s.crs, always_xy=True).transform(x, y)
        col, row = ~s.transform @ (east, north)
        return ndimage.map_coordinates(s.read(1).astype(float), [row - 0.5, col - 0.5], order=1, cval=np.nan)


@pytest.mark.parametrize("image", [chicago, vegas, massachusetts])
def test_real_images_are_in_their_place_and_claim_nothing_where_they_are_not(image, real_data, tmp_path):
    source, settings, resolution_m = image(real_data, tmp_path)
    city = open_city(source, settings, tmp_path / "city", resolution_m, reach_px=200)
    grid = city.make_grid()
    rgb, valid = ImageryReader(city.imagery, find_imagery(city), grid).window(0, 0, *grid.shape)
    assert valid.any()
    assert not valid.all()
    rows, cols = (v.ravel() for v in np.meshgrid(*(np.arange(8, n - 8, 5) for n in grid.shape), indexing="ij"))
    expected = by_proj(source, city, rows, cols)
    low, high = settings.get("value_range", (0, 255))
    expected = (expected - low) * 255 / (high - low)
    seen = ~np.isnan(expected) & (ndimage.minimum_filter(valid, 9)[rows, cols])

    def off_by(dy, dx):
        return np.abs(rgb[0][rows + dy, cols + dx].astype(float) - expected)[seen].mean()

    best = min((off_by(dy, dx), dy, dx) for dy in range(-3, 4) for dx in range(-3, 4))
    assert best[1:] == (0, 0), "no shift of whole pixels agrees better with PROJ than none"
    record = infer(city)
    road = MapReader(city).window("road", 0, 0, *grid.shape)
    assert record["windows"] > 0
    assert np.array_equal(road == NODATA, ~valid), "known just where there is an image"
