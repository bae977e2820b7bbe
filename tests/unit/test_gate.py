"""The gate, releases and roll-backs: readers see what was published, and an earlier map comes back whole."""

import json

import numpy as np
import pytest

from roadfuse_core.cubes import ingest
from roadfuse_core.errors import StoreError
from roadfuse_core.inference import MapReader, infer, published, release, rollback
from roadfuse_core.metrics import append_history, judge, read_history, score_city
from roadfuse_core.settings import GateSpec


def road(city, held=False):
    return MapReader(city, held=held).window("road", 0, 0, *city.make_grid().shape)


def entry(g_iou, nodata_px):
    return {"scores": {"map": {"test": {"g_iou": g_iou}}}, "record": {"nodata_px": nodata_px}, "published": True}


@pytest.mark.parametrize(
    ("g_iou", "nodata_px", "rejected", "why"),
    [
        (0.80, 0, 10, ()),
        (0.775, 0, 10, ()),
        (0.76, 0, 10, ("fell from 0.800 to 0.760",)),
        (0.80, 30_000, 10, ("mapped area shrank",)),
        (0.80, 0, 500, ("the newest dump lost 50.0%",)),
        (0.10, 250_000, 900, ("fell", "shrank", "lost")),
        (float("nan"), 0, 10, ("fell from 0.800 to nan",)),
    ],
)
def test_the_gate_says_why(small_city, g_iou, nodata_px, rejected, why):
    dumps = [{"rows": 1000, "rejected": {"outside": 10}}, {"rows": 1000, "rejected": {"outside": rejected}}]
    new = entry(g_iou, nodata_px)
    verdict = judge(small_city, new["record"], new["scores"], dumps, entry(0.8, 0))
    assert len(verdict.reasons) == len(why)
    assert all(part in reason for part, reason in zip(why, verdict.reasons, strict=True))
    assert verdict.passed == (not why)
    assert judge(small_city, new["record"], new["scores"], dumps, None).passed, "nothing to compare with"
    off = small_city.model_copy(update={"gate": GateSpec(g_iou_drop=None, coverage_drop=None, rejected_rise=None)})
    assert judge(off, new["record"], new["scores"], dumps, entry(0.8, 0)).passed


def test_the_history_outlives_a_line_that_a_crash_has_cut(small_city):
    small_city.workspace_path.mkdir()
    append_history(small_city, entry(0.5, 1))
    with open(small_city.workspace_path / "history.jsonl", "a") as file:
        file.write('{"scores": {"ma\n')
    append_history(small_city, entry(0.6, 2))
    assert [e["record"]["nodata_px"] for e in read_history(small_city)] == [1, 2]
    assert json.loads((small_city.workspace_path / "history.jsonl").read_text().splitlines()[0])["published"]


def test_a_held_map_waits_until_it_is_released(small_city):
    ingest(small_city, ["dumps/2026-03-29.parquet"])
    infer(small_city)
    before = road(small_city)
    ingest(small_city, ["dumps/2026-03-30.parquet"])
    record = infer(small_city, hold=True)
    assert record["held"]
    assert np.array_equal(road(small_city), before), "readers see the map before"
    waiting = road(small_city, held=True)
    assert not np.array_equal(waiting, before)
    assert score_city(small_city, held=True) != score_city(small_city)
    again = infer(small_city, hold=True)
    assert again["made"] == record["made"], "the candidate is not made twice"
    assert release(small_city)["made"] == record["made"]
    assert np.array_equal(road(small_city), waiting)
    with pytest.raises(StoreError, match="no map is held back"):
        release(small_city)
    infer(small_city, group="full", full=True)
    assert np.array_equal(MapReader(small_city, "full").window("road", 0, 0, *waiting.shape), waiting)


def test_a_candidate_is_void_when_something_else_was_published(small_city):
    ingest(small_city, ["dumps/2026-03-29.parquet"])
    infer(small_city)
    ingest(small_city, ["dumps/2026-03-30.parquet"])
    infer(small_city, hold=True)
    infer(small_city, "kde", group="baseline")
    with pytest.raises(StoreError, match="no map is held back"):
        release(small_city)


def test_a_rollback_brings_an_earlier_map_back_and_the_next_refresh_goes_on_from_it(small_city):
    maps = []
    for day in (29, 30, 31):
        ingest(small_city, [f"dumps/2026-03-{day}.parquet"])
        infer(small_city)
        infer(small_city, "kde", group="baseline")  # as a refresh does: what stands is not a map's own snapshot
        maps.append(road(small_city))
    tags = [tag for tag, _ in published(small_city)]
    assert len(tags) == 3
    assert rollback(small_city, dry_run=True) == tags[1]
    assert np.array_equal(road(small_city), maps[2]), "a dry run changes nothing"
    assert rollback(small_city) == tags[1]
    assert np.array_equal(road(small_city), maps[1])
    assert rollback(small_city) == tags[2]
    assert np.array_equal(road(small_city), maps[0])
    with pytest.raises(StoreError, match="no earlier map"):
        rollback(small_city)
    with pytest.raises(StoreError, match="published maps are"):
        rollback(small_city, "map-1999")
    assert rollback(small_city, tags[0]) == tags[0]
    rollback(small_city, tags[2])
    infer(small_city)
    assert np.array_equal(road(small_city), maps[2]), "all dumps since then are seen"
