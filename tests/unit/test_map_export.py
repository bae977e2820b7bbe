"""Exports of a map are brought up to date tile by tile: valid for GDAL, and the same bytes as when all is written."""

import os

import numpy as np
import pytest
import rasterio
from rasterio.enums import MaskFlags
from rio_cogeo.cogeo import cog_validate

from roadfuse_core.errors import StoreError
from roadfuse_core.grid import Grid, TileIndex
from roadfuse_core.mosaic import NODATA, export_map
from roadfuse_core.mosaic import _tiff as tiff

GRID = Grid("EPSG:32634", 0.5, 64, 1200, 90_000, 37, 45)  # 2368 by 2880 px: no multiple of the file's tiles


def values(seed, how="average"):
    """Smooth, with roads in it, and half of it unknown."""
    rng = np.random.default_rng(seed)
    out = np.kron(rng.integers(0, 255 if how == "average" else 2, (37, 45)), np.ones((64, 64))).astype(np.uint8)
    out[:900, 1500:] = NODATA
    out[2000:, :40] = NODATA
    out[rng.random(out.shape) < 0.01] = NODATA
    return out


class Reads:
    """A map in memory that counts what is read of it."""

    def __init__(self, array):
        self.array, self.windows = array, 0

    def __call__(self, row, col, height, width):
        self.windows += 1
        return self.array[row : row + height, col : col + width]


def halved(x, how):
    """By plain arithmetic, pixel by pixel, with Python's own numbers."""
    x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2)), constant_values=NODATA)
    four = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).transpose(0, 2, 1, 3).reshape(x.shape[0] // 2, x.shape[1] // 2, 4)
    known = four != NODATA
    n = known.sum(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, four, 0).sum(2) / n
    out = np.floor(mean + 0.5) if how == "average" else (mean >= 0.5)
    return np.where(n > 0, out, NODATA).astype(np.uint8)


@pytest.mark.parametrize("how", ["average", "mode"])
def test_gdal_reads_what_was_written_with_overviews_and_masks(tmp_path, how):
    array = values(1, how)
    export_map(tmp_path / "a.tif", GRID, Reads(array), how)
    valid, errors, warnings = cog_validate(tmp_path / "a.tif", strict=True)
    assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(tmp_path / "a.tif") as source:
        assert (source.shape, source.dtypes, source.count) == (GRID.shape, ("uint8",), 1)
        assert source.crs == rasterio.CRS.from_string(GRID.crs)
        assert source.transform == GRID.affine
        assert source.block_shapes == [(512, 512)]
        assert source.overviews(1) == [2, 4, 8]
        assert source.mask_flag_enums == ([MaskFlags.per_dataset],)
    expected = array
    for level in (None, 0, 1, 2):
        if level is not None:
            expected = halved(expected, how)
        with rasterio.open(tmp_path / "a.tif", overview_level=level) as source:
            assert np.array_equal(source.read(1), expected)
            assert np.array_equal(source.dataset_mask() > 0, expected != NODATA)


@pytest.mark.parametrize("limit", [tiff.CLASSIC_LIMIT, 0])
def test_a_change_compresses_only_what_it_touches_and_the_bytes_are_those_of_a_full_export(tmp_path, monkeypatch, limit):
    """In classic and in big TIFF."""
    monkeypatch.setattr(tiff, "CLASSIC_LIMIT", limit)
    array, path = values(1), tmp_path / "a.tif"
    full = export_map(path, GRID, Reads(array), "average")
    assert path.read_bytes()[2] == (42 if limit else 43)
    rng = np.random.default_rng(2)
    for changed in ([TileIndex(3, 4)], [TileIndex(36, 44), TileIndex(8, 7)], [TileIndex(0, 0)], []):
        for tile in changed:
            array[tile.row * 64 : (tile.row + 1) * 64, tile.col * 64 : (tile.col + 1) * 64] = rng.integers(0, 256, (64, 64))
        reads = Reads(array)
        made = export_map(path, GRID, reads, "average", changed)
        assert reads.windows == len(changed)
        assert made <= 2 * 4 * len(changed) < full / 4
        export_map(tmp_path / "b.tif", GRID, Reads(array), "average")
        assert path.read_bytes() == (tmp_path / "b.tif").read_bytes()
        assert cog_validate(path, strict=True)[0]
        with rasterio.open(path) as source:
            assert np.array_equal(source.read(1), array)


@pytest.mark.parametrize(
    ("tile_px", "tiles"),
    [(64, (1, 1)), (512, (1, 1)), (256, (3, 2)), (1024, (1, 2)), (2048, (1, 1)), (64, (11, 1)), (64, (1, 11))],
)
def test_cities_of_any_size(tmp_path, tile_px, tiles):
    grid = Grid("EPSG:32633", 1.0, tile_px, 0, 9000, *tiles)
    array = np.random.default_rng(0).integers(0, 256, grid.shape, dtype=np.uint8)
    export_map(tmp_path / "a.tif", grid, Reads(array), "average")
    assert cog_validate(tmp_path / "a.tif", strict=True)[0]
    array[:50, :50] = 3
    export_map(tmp_path / "a.tif", grid, Reads(array), "average", [TileIndex(0, 0)])
    with rasterio.open(tmp_path / "a.tif") as source:
        assert np.array_equal(source.read(1), array)


def test_an_empty_map_takes_next_to_no_room(tmp_path):
    """Tiles without data are stored once."""
    export_map(tmp_path / "a.tif", GRID, Reads(np.full(GRID.shape, NODATA, np.uint8)), "mode")
    assert os.stat(tmp_path / "a.tif").st_size < 8000
    assert cog_validate(tmp_path / "a.tif", strict=True)[0]


def test_a_full_disk_leaves_the_export_as_it_was(small_disk, fill):
    disk = small_disk("3m")
    path = disk / "a.tif"
    export_map(path, GRID, Reads(values(1)), "average")
    before = path.read_bytes()
    fill(disk / "filler")
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - 100_000)
    noise = np.random.default_rng(0).integers(0, 255, GRID.shape, dtype=np.uint8)
    with pytest.raises(StoreError, match=r"a\.tif: cannot be written \(.*o space.*run again"):
        export_map(path, GRID, Reads(noise), "average")
    assert path.read_bytes() == before
    assert sorted(f.name for f in disk.iterdir()) == ["a.tif", "filler"]
