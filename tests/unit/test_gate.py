"""The gate, candidates and roll-backs: readers see what was published, and an earlier map comes back whole."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from roadfuse_core.cubes import expire, ingest, ledger
from roadfuse_core.errors import StoreError
from roadfuse_core.inference import MapReader, infer, map_key, published, release, rollback
from roadfuse_core.metrics import (
    Dumps,
    HistoryEntry,
    MapFigures,
    append_history,
    judge,
    next_reference,
    read_history,
    score_city,
    scores_to_store,
    stored_scores,
)
from roadfuse_core.publication import decide, score_map
from roadfuse_core.settings import GateSpec
from tests.unit.test_release import city, edit, refresh, run, use  # noqa: F401


def road(city, held=False):
    return MapReader(city, held=held).window("road", 0, 0, *city.make_grid().shape)


BEFORE = MapFigures(mapped_px=100_000, road_px=10_000, g_iou=0.8, basis="labels")


def dump(name, rejected):
    return {"dump": name, "rows": 1000, "rejected": {"outside": rejected}}


def decided(new, published=BEFORE, reference=None, dumps=(), gate=None):
    return judge(gate or GateSpec(), new, published, reference, Dumps([dump("a", 10)], dumps)).reasons


@pytest.mark.parametrize(
    ("changes", "rejected", "why"),
    [
        ({}, 10, ()),
        ({"g_iou": 0.775}, 10, ()),
        ({"g_iou": 0.76}, 10, ("fell from 0.800 to 0.760",)),
        ({"mapped_px": 94_000, "road_px": 9_400}, 10, ("mapped area shrank from 100,000 to 94,000 pixels",)),
        ({"mapped_px": 96_000, "road_px": 9_600}, 10, ()),
        ({}, 500, ("dump b lost 50.0%",)),
        ({"g_iou": 0.1, "mapped_px": 50, "road_px": 50}, 900, ("fell", "shrank", "road went", "lost")),
        ({"g_iou": None}, 10, ("g_iou cannot be measured; it was 0.800",)),
        ({"g_iou": None, "basis": None}, 10, ()),
        ({"road_px": 6_900}, 10, ("road went from 10.00% to 6.90% of the mapped area",)),
        ({"road_px": 14_400}, 10, ("road went from 10.00% to 14.40%",)),
        ({"road_px": 7_100}, 10, ()),
        ({"road_px": 0}, 10, ("road went from 10.00% to 0.00%",)),
        ({"road_px": 0, "g_iou": None, "basis": None}, 10, ("road went",)),
        ({"mapped_px": 0, "road_px": 0}, 10, ("shrank", "road went")),
    ],
)  # fmt: skip
def test_the_gate_says_why(changes, rejected, why):
    new, dumps = replace(BEFORE, **changes), [dump("b", rejected)]
    reasons = decided(new, dumps=dumps)
    assert len(reasons) == len(why), reasons
    assert all(part in reason for part, reason in zip(why, reasons, strict=True))
    assert judge(GateSpec(), new, None, None, Dumps([], dumps)).passed, "nothing to compare with"
    off = GateSpec(**dict.fromkeys(GateSpec.model_fields))
    assert not decided(new, dumps=dumps, gate=off)


def test_the_mapped_area_is_compared_with_itself_not_with_the_grid():
    """A sparse city, of which one pixel in a thousand is mapped, loses its map."""
    sparse = MapFigures(mapped_px=250, road_px=100)
    assert "from 250 to 200 pixels" in decided(MapFigures(200, 80), sparse)[0]


@pytest.mark.parametrize(
    ("step", "held_after"),
    [
        (lambda f: replace(f, g_iou=f.g_iou - 0.029), 3),
        (lambda f: replace(f, mapped_px=int(f.mapped_px * 0.951), road_px=int(f.road_px * 0.951)), 3),
        (lambda f: replace(f, road_px=int(f.road_px * 0.75)), 3),
        (lambda f: replace(f, road_px=int(f.road_px * 1.3)), 3),
    ],
)
def test_small_losses_add_up(step, held_after):
    """Each passes by itself; the sum does not, and begins again once a person released a map."""
    figures, reference, passed = BEFORE, next_reference(BEFORE, None), 0
    while not decided(step(figures), figures, reference):
        figures = step(figures)
        reference = next_reference(figures, reference)
        passed += 1
        assert passed < 20
    assert passed + 1 == held_after
    assert "drifted" in decided(step(figures), figures, reference)[0]
    released = step(figures)
    assert not decided(step(released), released, next_reference(released, None))


def test_what_improved_is_not_given_away_again():
    better = replace(BEFORE, g_iou=0.86)
    reference = next_reference(better, next_reference(BEFORE, None))
    back = replace(BEFORE, g_iou=0.835)
    assert not decided(back, better, reference)
    assert "drifted from 0.860" in decided(replace(back, g_iou=0.79), replace(back, g_iou=0.81), reference)[0]


def test_a_published_score_that_is_no_number_holds_nothing():
    unknown = replace(BEFORE, g_iou=None)
    reference = next_reference(unknown, None)
    verdict = judge(GateSpec(), BEFORE, unknown, reference, Dumps())
    assert verdict.passed
    assert "is no number" in verdict.notes[0]
    assert next_reference(BEFORE, reference).g_iou == 0.8
    assert "fell" in decided(replace(BEFORE, g_iou=0.7), BEFORE, next_reference(BEFORE, reference))[0]


def test_every_dump_since_the_published_map_is_judged():
    assert "dump b lost 90.0%" in decided(BEFORE, dumps=[dump("b", 900), dump("c", 10)])[0]
    assert len(decided(BEFORE, dumps=[dump("b", 900), dump("c", 10), dump("d", 600)])) == 2
    assert not decided(BEFORE, dumps=[{"dump": "e", "rows": 0, "rejected": {}}])


def entry(g_iou, nodata_px):
    scores = {"map": {"test": {"g_iou": g_iou}}}
    return HistoryEntry(published=True, record={"nodata_px": nodata_px}, scores=scores, seconds=1, windows_failed=0)


GARBAGE = {
    "a cut line": b'{"scores": {"ma',
    "no UTF-8": b"\xff\xfe\x00\n",
    "foreign JSON": b"null\n{}\n[1]\n3\n\"x\"\n",
    "zeros": b"\0" * 300,
    "foreign types": b'{"published": true, "record": 3, "scores": "x"}\n',
    "deep nesting": b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_the_history_outlives_what_a_crash_or_another_program_left(small_city, garbage):
    small_city.workspace_path.mkdir()
    append_history(small_city, entry(0.5, 1))
    with open(small_city.workspace_path / "history.jsonl", "ab") as file:
        file.write(garbage)
    append_history(small_city, entry(float("nan"), 2))
    found = read_history(small_city)
    assert [e.record["nodata_px"] for e in found] == [1, 2]
    assert [e.g_iou() for e in found] == [0.5, None]
    last = (small_city.workspace_path / "history.jsonl").read_bytes().splitlines()[-1]
    assert json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["published"]


def test_a_full_disk_at_the_history_is_told_and_costs_no_entry(small_city, small_disk, fill):
    place = small_disk("1m")
    city = small_city.model_copy(update={"workspace": str(place)})
    append_history(city, entry(0.5, 1))
    fill(place / "rest")
    long = entry(0.5, 3).model_copy(update={"reasons": ("x" * 9000,)})
    with pytest.raises(StoreError, match="cannot be written"):
        append_history(city, long)
    (place / "rest").unlink()
    append_history(city, entry(0.6, 2))
    assert [e.record["nodata_px"] for e in read_history(city)] == [1, 2]


@pytest.mark.parametrize("harm", ["gone", "empty", "zeros", "cut"])
def test_a_damaged_history_does_not_open_the_gate(city, harm):
    """The scores of the published map are in the store, and what it is compared with."""
    ingest(city)
    refresh(city)
    path = city.workspace_path / "history.jsonl"
    content = path.read_bytes()
    path.write_bytes({"gone": b"", "empty": b"", "zeros": b"\0" * len(content), "cut": content[: len(content) // 2]}[harm])
    if harm == "gone":
        path.unlink()
    (city.workspace_path / "scores/map.parquet").unlink()
    assert "fell" in refresh(use(city, 60.0))[0]


def test_a_map_that_was_published_without_scores_is_scored_before_it_is_replaced(city):
    ingest(city)
    infer(city)
    bad = use(city, 60.0)
    record = infer(bad, hold=True)
    verdict = decide(bad, map_key(record), score_map(bad, held=True))
    assert "fell" in verdict.reasons[0]
    assert verdict.notes == ("the published map had no scores stored: it was scored again",)


def relabel(city, change):
    """Labels in a file of the city's own, changed."""
    source = (city.root / "truth").resolve() / "roads.tif"
    with rasterio.open(source) as old:
        values, profile = old.read(1), old.profile
    path = city.root / f"labels-{change.__name__}.tif"
    with rasterio.open(path, "w", **profile) as new:
        new.write(change(values), 1)
    return edit(city, labels={"roads": {"path": path.name}})


def sparser(values):
    return np.where(np.arange(values.shape[1]) % 5 == 0, values, 0).astype(values.dtype)


def test_other_labels_are_no_worse_map_and_do_not_hide_one(city):
    """g_iou falls because the labels changed: the published map is scored on them too, and only a worse map is held."""
    ingest(city)
    refresh(city)
    before = score_map(city).subsets["test"]["g_iou"]
    other = relabel(use(city, 0.0501), sparser)
    record = infer(other, hold=True)
    scored = score_map(other, held=True)
    assert scored.subsets["test"]["g_iou"] < before - city.gate.g_iou_drop
    verdict = decide(other, map_key(record), scored)
    assert verdict.passed
    assert "scored on them again" in verdict.notes[0]
    assert "fell" in refresh(use(other, 60.0))[0]
    bare = edit(use(other, 60.0), labels={})
    record = infer(bare, hold=True)
    verdict = decide(bare, map_key(record), None)
    assert "no labels any more" in verdict.notes[0]
    assert any("road went" in reason for reason in verdict.reasons), "the area of road is watched without labels"


def add_dump(city, day, share):
    """A dump of which a share of the rows lies elsewhere."""
    table = pq.read_table(city.root / f"dumps/2026-03-{day}.parquet")
    lon = table["lon"].to_numpy().copy()
    lon[: int(share * len(lon))] += 5
    path = city.root / f"{day}.parquet"
    pq.write_table(table.set_column(table.column_names.index("lon"), "lon", pa.array(lon)), path)
    ingest(city, [str(path)])


def only_dumps(city):
    """The city under a gate that looks at dumps alone."""
    return edit(city, gate=dict.fromkeys(set(GateSpec.model_fields) - {"rejected_rise"}))


def test_a_bad_dump_is_held_back_also_with_the_next_good_one_until_it_is_released(city):
    city = only_dumps(city)
    add_dump(city, 29, 0)
    assert refresh(city) == ()
    add_dump(city, 30, 0.9)
    (reason,) = refresh(city)
    assert "lost 9" in reason
    add_dump(city, 31, 0)
    (reason,) = refresh(city)
    assert "lost 9" in reason, "the good dump does not hide it"
    run("release", city)
    assert len(ledger(city)) == 3
    refreshed = use(city, 0.06)
    assert refresh(refreshed) == (), "what a person released is accepted"


def test_a_bad_dump_is_told_where_the_snapshot_of_the_published_map_was_expired(city):
    city = only_dumps(city)
    add_dump(city, 29, 0)
    assert refresh(city) == ()
    # A dump of a later second than the map: the record of a map states whole seconds.
    while datetime.now(UTC) < datetime.fromisoformat(MapReader(city).record["made"]) + timedelta(seconds=1):
        pass
    add_dump(city, 30, 0.9)
    expire(city, datetime.now(UTC) + timedelta(days=1))
    (reason,) = refresh(city)
    assert "lost 9" in reason


def test_a_release_is_what_later_maps_are_compared_with(city):
    ingest(city)
    refresh(city)
    bad = use(city, 60.0)
    assert refresh(bad)
    run("release", bad)
    assert refresh(use(city, 61.0)) == (), "as bad as the one that was released"


def test_scores_outlive_their_record(city):
    ingest(city)
    infer(city)
    scored = score_city(city)
    odd = replace(scored, subsets=scored.subsets | {"test": scored.subsets["test"] | {"f1": math.nan}})
    stored = json.loads(json.dumps(scores_to_store(odd), allow_nan=False))
    found = stored_scores({"scores": stored})
    assert math.isnan(found.subsets["test"]["f1"])
    assert (found.on, found.subsets["all"]) == (scored.on, scored.subsets["all"])
    assert stored_scores({}) is None


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
    assert score_city(small_city, held=True).subsets != score_city(small_city).subsets
    again = infer(small_city, hold=True)
    assert again["made"] == record["made"], "the candidate is not made twice"
    assert release(small_city)["made"] == record["made"]
    assert np.array_equal(road(small_city), waiting)
    with pytest.raises(StoreError, match="no map is held back"):
        release(small_city)
    infer(small_city, group="full", full=True)
    assert np.array_equal(MapReader(small_city, "full").window("road", 0, 0, *waiting.shape), waiting)


def test_a_candidate_is_void_when_something_else_was_published(city):
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    ingest(city, ["dumps/2026-03-30.parquet"])
    infer(city, hold=True)
    infer(city, "kde", group="baseline")
    with pytest.raises(StoreError, match="no map is held back"):
        release(city)


def test_a_rollback_brings_an_earlier_map_back_and_the_next_refresh_goes_on_from_it(city):
    maps = []
    for day in (29, 30, 31):
        ingest(city, [f"dumps/2026-03-{day}.parquet"])
        infer(city)
        infer(city, "kde", group="baseline")  # as a refresh does: what stands is not a map's own snapshot
        maps.append(road(city))
    tags = [tag for tag, _ in published(city)]
    assert len(tags) == 3
    assert rollback(city, dry_run=True) == tags[1]
    assert np.array_equal(road(city), maps[2]), "a dry run changes nothing"
    assert rollback(city) == tags[1]
    assert np.array_equal(road(city), maps[1])
    assert rollback(city) == tags[2]
    assert np.array_equal(road(city), maps[0])
    with pytest.raises(StoreError, match="no earlier map"):
        rollback(city)
    with pytest.raises(StoreError, match="published maps are"):
        rollback(city, "map-1999")
    assert rollback(city, tags[0]) == tags[0]
    rollback(city, tags[2])
    infer(city)
    assert np.array_equal(road(city), maps[2]), "all dumps since then are seen"
