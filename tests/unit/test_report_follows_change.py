"""A report reads what changed since the one before, and shows what a report from nothing shows."""

import shutil

import numpy as np
import pytest

from roadfuse_core.cubes import ingest
from roadfuse_core.grid import Block
from roadfuse_core.inference import MapReader, infer, rollback
from roadfuse_core.report import _pictures as pictures
from roadfuse_core.report import map_preview, overview_pictures
from tests.unit.test_changes import write_dump


@pytest.fixture
def city(small_city, monkeypatch):
    """Points, images, labels and an existing map; mapped by kernel density, which is quick; pictures by blocks of a tile."""
    monkeypatch.setattr(pictures, "BLOCK_PX", 128)
    city = small_city.model_copy(update={"model": small_city.model.model_copy(update={"weights": "kde"})})
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    return city


@pytest.fixture
def painted(monkeypatch):
    """How many blocks are reduced."""
    seen, real = [], pictures._cells
    monkeypatch.setattr(pictures, "_cells", lambda *a: (seen.append(1), real(*a))[1])
    return seen


def look(city, painted):
    painted.clear()
    found = overview_pictures(city), map_preview(city)
    return found, len(painted)


def assert_as_from_nothing(city, painted, found):
    shutil.rmtree(city.workspace_path / "outputs")
    assert look(city, painted)[0] == found


def test_a_report_after_a_dump_reads_the_blocks_that_see_it(city, painted):
    first, every = look(city, painted)
    assert len(first[0]) == 6
    assert every == 16 * 7
    assert look(city, painted) == (first, 0)
    ingest(city, [write_dump(city, "corner", Block(0, 0, 60, 60))])
    infer(city)
    found, some = look(city, painted)
    assert 5 <= some < every / 2
    assert found != first
    assert_as_from_nothing(city, painted, found)
    rollback(city)
    found, again = look(city, painted)
    assert again >= 4 * 16, "what shows the map"
    assert_as_from_nothing(city, painted, found)


def test_pictures_that_are_not_as_they_were_written_are_made_again(city, painted):
    first, every = look(city, painted)
    folder = city.workspace_path / "outputs"
    whole = (folder / "overviews.npz").read_bytes()
    for damage in (
        b"",
        whole[:-9],
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
    ):
        (folder / "overviews.npz").write_bytes(damage)
        assert look(city, painted) == (first, every - 16)
        (folder / "preview.json").write_text("{}")
        (folder / "preview.npz").unlink()
        assert look(city, painted) == (first, 16)


def test_other_labels_and_other_images_are_seen(city, painted):
    look(city, painted)
    (city.root / "imagery").unlink()
    shutil.copytree((city.root / "truth").resolve().parent / "imagery", city.root / "imagery")
    (city.root / "truth").unlink()
    shutil.copytree(city.root.joinpath("old_map.gpkg").resolve().parent / "truth", city.root / "truth")
    import rasterio

    with rasterio.open(city.root / "truth/roads.tif") as source:
        profile, road = source.profile, source.read()
    with rasterio.open(city.root / "truth/roads.tif", "w", **profile) as target:
        target.write(np.roll(road, 40, 1))
    found, some = look(city, painted)
    assert some == 3 * 16, "image, truth, errors"
    assert_as_from_nothing(city, painted, found)
    assert MapReader(city).snapshot
