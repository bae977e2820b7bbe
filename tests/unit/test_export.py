"""Exports: two writers do not meet, a user's files stay, and a full disk is one line that says so."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import rasterio

from roadfuse_core.errors import StoreError
from roadfuse_core.files import write_whole
from roadfuse_core.grid import Bounds, make_grid
from roadfuse_core.mosaic import NODATA, write_cog

GRID = make_grid(Bounds(13.19, 47.39, 13.2003, 47.3987), 1.0, 64, None)


def noise(seed):
    return np.random.default_rng(seed).integers(0, 255, GRID.shape).astype(np.uint8)


def write(path, values, meet=lambda: None):
    def read(row, col, height, width):
        meet()
        return values[row : row + height, col : col + width]

    return write_cog(path, GRID, read, "uint8", NODATA)


def pixels(path):
    with rasterio.open(path) as source:
        return source.read(1)


def test_two_exports_at_once_both_write_all_their_pixels(tmp_path):
    """Both read their blocks while the other's file is open, and each is whole under the published name when it ends."""
    path, both = tmp_path / "a.tif", threading.Barrier(2, timeout=60)
    versions = [noise(1), noise(2)]
    failed = []

    def work(values):
        try:
            write(path, values, both.wait)
            assert any(np.array_equal(pixels(path), v) for v in versions)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(v,)) for v in versions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert any(np.array_equal(pixels(path), v) for v in versions)
    assert [f.name for f in tmp_path.iterdir()] == ["a.tif"], "nothing is left beside it"


def test_files_of_a_user_beside_an_export_stay(tmp_path):
    names = ("a.plain.tif", "a.part.tif", "a.tif.part", "a.part")
    for name in names:
        (tmp_path / name).write_text("mine")
    write(tmp_path / "a.tif", noise(1))
    write_whole(tmp_path / "a.tif", "text")
    assert {name: (tmp_path / name).read_text() for name in names} == dict.fromkeys(names, "mine")
    assert len(list(tmp_path.iterdir())) == 1 + len(names)


def test_an_export_that_cannot_read_leaves_the_file_before(tmp_path):
    before = noise(1)
    write(tmp_path / "a.tif", before)

    def fails():
        raise StoreError("the map cannot be read")

    with pytest.raises(StoreError, match="the map cannot be read"):
        write(tmp_path / "a.tif", noise(2), fails)
    assert np.array_equal(pixels(tmp_path / "a.tif"), before)
    assert [f.name for f in tmp_path.iterdir()] == ["a.tif"]


# Room for the first blocks, for the plain file, for nearly all of the finished one.
@pytest.mark.parametrize("kib", [40, 640, 1200, 2200, 2600])
def test_a_full_disk_is_told_and_the_file_before_stays(small_disk, fill, kib):
    place = small_disk("16m")
    before = write(place / "a.tif", noise(1))
    used_kib = sum(f.stat().st_size for f in place.iterdir()) // 1024
    small_disk(f"{used_kib + kib}k")
    with pytest.raises(StoreError, match=r"a\.tif: cannot be written \(.*; [0-2]\.\d MB are free there\)") as told:
        write(before, noise(2))
    assert "\n" not in str(told.value)
    assert np.array_equal(pixels(before), noise(1))
    assert [f.name for f in place.iterdir()] == ["a.tif"], "what was begun is removed"


def test_what_gdal_loses_at_the_very_end_is_noticed(small_disk):
    """With a little less room than the file needs, GDAL says nothing, and the file's last overview cannot be read."""
    refused, room_kib = 0, 3216
    while refused < 3:
        place = small_disk(f"{room_kib}k")
        try:
            write(place / "a.tif", noise(1))
        except StoreError:
            refused += 1
            assert not list(place.iterdir())
        else:
            assert not refused, "less room is enough, and more was not"
            with rasterio.open(place / "a.tif", overview_level=0) as source:
                assert source.read(1).any()
            (place / "a.tif").unlink()
        room_kib -= 16


def test_a_small_file_is_whole_or_as_before_on_a_full_disk(small_disk, fill):
    place = small_disk("1m")
    write_whole(place / "x.json", "before")
    fill(place / "rest")
    with pytest.raises(OSError, match="No space"):
        write_whole(place / "x.json", "x" * 9000)
    assert (place / "x.json").read_text() == "before"
    assert sorted(f.name for f in place.iterdir()) == ["rest", "x.json"]


def test_small_files_of_two_processes_at_once_are_whole(tmp_path):
    """Two processes write the same file many times; whoever renames last, one whole text stands there."""
    code = """
import sys
from pathlib import Path
from roadfuse_core.files import write_whole
for _ in range(200):
    write_whole(Path(sys.argv[1]), sys.argv[2] * 70_000)
"""
    path = tmp_path / "x"
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "ab"]
    assert [p.wait() for p in started] == [0, 0]
    assert path.read_text() in ("a" * 70_000, "b" * 70_000)
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
