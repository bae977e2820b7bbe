"""An incremental map equals a full one, whatever the window, its stride, the block and the tile."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer

from roadfuse_core.cubes import Layer, cubes_path, ingest
from roadfuse_core.grid import Block, Grid, Lattice, blocks_of
from roadfuse_core.inference import MapReader, infer
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _plan as planning
from roadfuse_core.inference._coverage import cells_within, pixels_of
from roadfuse_core.settings import City, load_city

WINDOWS = [(size, size // k) for size in (64, 96, 224, 320, 384) for k in (2, 3, 4) if size % k == 0]
TILES = (64, 128, 256)


class Uneven:
    """Cheap, and another answer for every place in a window and every content: a pixel that stands or moves by one shows."""

    name, rasters, planes, target = "uneven", ("image",), ("probability", "gate_image"), None
    layers = (Layer(kind="log_count", cap=9, sigma_px=2, radius_px=4),)

    def __init__(self, window_px):
        self.window_px = window_px
        place = np.random.default_rng(window_px).random((window_px, window_px), dtype=np.float32)
        self.place = torch.from_numpy(place)

    def prepare(self, inputs):
        return {name: torch.from_numpy(x).float() for name, x in inputs.items()}

    def predict(self, inputs):
        image, gps = inputs["image"].mean(3) / 255, inputs["gps"][..., 0]
        seen = image.mean((1, 2), keepdim=True) + gps.mean((1, 2), keepdim=True)
        road = ((self.place + image + 3 * gps + 7 * seen) % 1).numpy()
        return np.stack([road, 1 - road], 1)


@pytest.fixture
def predict_with(monkeypatch):
    """Everything is predicted by windows of a size and a stride."""

    def install(window_px, stride_px):
        made = Uneven(window_px)
        monkeypatch.setattr(blocks_module, "predictor_of", lambda ref, resolution_m: made)
        monkeypatch.setattr(planning, "read_facts", lambda ref, resolution_m: made)
        monkeypatch.setattr(planning, "Lattice", lambda size, _: Lattice(size, stride_px))
        monkeypatch.setattr(planning, "_memory", lambda *_: 0)

    return install


def write_points(grid: Grid, path: Path, at: Block, n: int) -> str:
    """A dump of n points in a rectangle of pixels."""
    rng = np.random.default_rng(n)
    east = grid.bounds.left + rng.uniform(at.col0, at.col1, n) * grid.resolution_m
    north = grid.bounds.top - rng.uniform(at.row0, at.row1, n) * grid.resolution_m
    lon, lat = Transformer.from_crs(grid.crs, 4326, always_xy=True).transform(east, north)
    pq.write_table(pa.table({"lon": lon, "lat": lat}), path)
    return path.name


def write_image(grid: Grid, path: Path, at: Block, seed: int) -> None:
    """An image of noise over a rectangle of pixels of the grid."""
    height, width = at.row1 - at.row0, at.col1 - at.col0
    with rasterio.open(path, "w", driver="GTiff", height=height, width=width, count=3, dtype="uint8", crs=grid.crs,
                       transform=grid.affine @ rasterio.Affine.translation(at.col0, at.row0)) as target:  # fmt: skip
        target.write(np.random.default_rng(seed).integers(0, 255, (3, height, width), dtype=np.uint8))


def write_city(root: Path, tile_px: int) -> City:
    """About 700 by 570 px, an image over most of it, points everywhere; ingested."""
    west, south, east, north = 15.0, 47.0, 15.0088, 47.0049
    spec = {"name": "plain", "workspace": "work",
            "grid": {"bounds": [west, south, east, north], "crs": "EPSG:32633", "resolution_m": 1.0, "tile_px": tile_px},
            "points": {"sources": ["dump.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
            "imagery": {"sources": ["imagery/*.tif"]}, "model": {"weights": "kde", "batch": 3, "threshold": 0.5}}  # fmt: skip
    (root / "imagery").mkdir()
    (root / "city.yaml").write_text(yaml.safe_dump(spec))
    city = load_city(root / "city.yaml")
    grid = city.make_grid()
    height, width = grid.shape
    write_image(grid, root / "imagery/1-all.tif", Block(0, 0, height - 130, width - 91), 1)
    write_points(grid, root / "dump.parquet", Block(0, 0, height, width), 5000)
    ingest(city)
    return city


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    """For each size of a tile a city whose cube is kept as it was before a dump, and after it."""
    out = {}
    for tile_px in TILES:
        root = tmp_path_factory.mktemp(f"tiles-{tile_px}")
        city = write_city(root, tile_px)
        shutil.copytree(cubes_path(city), root / "before")
        ingest(city, [write_points(city.make_grid(), root / "few.parquet", Block(61, 42, 75, 53), 200)])
        shutil.copytree(cubes_path(city), root / "after")
        shutil.rmtree(city.workspace_path)
        out[tile_px] = root
    return out


@pytest.fixture
def city_of(cities, tmp_path):
    """The city of a tile size before the second dump, in files of its own."""

    def make(tile_px):
        shutil.copytree(cities[tile_px], tmp_path / "city")
        made = load_city(tmp_path / "city/city.yaml")
        put_cube(made, "before")
        return made

    return make


def put_cube(city: City, which: str) -> None:
    shutil.rmtree(cubes_path(city), ignore_errors=True)
    shutil.copytree(city.root / which, cubes_path(city))


def arrays(city: City, group: str = "map") -> dict[str, np.ndarray]:
    reader = MapReader(city, group)
    return {name: reader.window(name, 0, 0, *city.make_grid().shape) for name in reader.arrays}


def assert_incremental_equals_full(city: City) -> None:
    before = arrays(city)
    record = infer(city)
    assert not record["full"]
    assert 0 < record["windows"] < record["windows_possible"]
    got = arrays(city)
    assert not np.array_equal(got["road"], before["road"]), "the change is seen"
    whole = infer(city, group="full", full=True)
    expected = arrays(city, "full")
    for name, values in expected.items():
        assert np.array_equal(got[name], values), (name, int((got[name] != values).sum()))
    assert (record["nodata_px"], record["road_px"]) == (whole["nodata_px"], whole["road_px"])


SIZES = ((64, 64), (64, 320), (128, 128), (128, 384), (256, 256))  # a tile, and a block


@pytest.mark.parametrize(("window", "size"), [(window, SIZES[k % 5]) for k, window in enumerate(WINDOWS)])
def test_any_window_stride_block_and_tile(window, size, city_of, predict_with, monkeypatch):
    """A dump and an image near a corner of the city, against everything predicted."""
    (window_px, stride_px), (tile_px, block_px) = window, size
    monkeypatch.setattr(planning, "BLOCK_PX", block_px)
    predict_with(window_px, stride_px)
    city = city_of(tile_px)
    infer(city)
    put_cube(city, "after")
    write_image(city.make_grid(), city.root / "imagery/0-first.tif", Block(95, 21, 130, 68), 2)
    assert_incremental_equals_full(city)


@given(st.sampled_from(WINDOWS), st.sampled_from((64, 128, 256)), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_cells_of_blocks_are_cells_of_the_city(window, tile_px, block_tiles, seed):
    """Whatever is marked: the blocks' pixels are those of the cells, none moved and none missing."""
    lattice, grid = Lattice(*window), Grid("EPSG:32633", 1.0, tile_px, 0, 20, 5, 7)
    height, width = grid.shape
    marked = np.random.default_rng(seed).random((-(-height // lattice.stride_px), -(-width // lattice.stride_px))) < 0.5
    expected = marked.repeat(lattice.stride_px, 0).repeat(lattice.stride_px, 1)[:height, :width]
    for block in blocks_of(grid, block_tiles):
        got = pixels_of(cells_within(marked, lattice, block), lattice, block)
        assert np.array_equal(got, expected[block.row0 : block.row1, block.col0 : block.col1])


def test_an_image_beyond_the_rim_that_windows_see(city_of, predict_with):
    """It lies outside the city, comes, changes and goes; windows that reach past the rim see it all the same."""
    predict_with(96, 32)
    city = city_of(64)
    infer(city)
    width = city.make_grid().shape[1]
    place = city.root / "imagery/0-first.tif"
    for at, seed in ((Block(-50, 40, -10, 80), 3), (Block(-50, 40, -10, 80), 4), (Block(100, width + 5, 140, width + 60), 4)):
        write_image(city.make_grid(), place, at, seed)
        assert_incremental_equals_full(city)
    place.unlink()
    assert_incremental_equals_full(city)
