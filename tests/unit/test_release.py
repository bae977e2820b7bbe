"""What is published is one map for everybody: readers of the Zarr, of the files and of the report, and the gate."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pystac
import pytest
import rasterio
import yaml
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core import publication
from roadfuse_core.cubes import committer_lock, expire, ingest
from roadfuse_core.errors import StoreError
from roadfuse_core.inference import MapReader, infer, map_key, published, rollback, waiting
from roadfuse_core.inference import _publish as publishing
from roadfuse_core.metrics import read_history, score_city
from roadfuse_core.publication import decide, export_published, outputs_lock, record_run, score_map
from roadfuse_core.settings import City, load_city


def edit(city, **changes) -> City:
    path = city.root / "city.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return load_city(path)


@pytest.fixture
def city(small_city) -> City:
    """The small city under kernel density, which is quick; a map for each of several thresholds."""
    return use(small_city, 0.05)


def use(city, threshold, **changes) -> City:
    text = json.dumps({"sigma_m": 3, "threshold_per_m2": threshold, "tuned_on": "-"})
    (city.root / "kde.json").write_text(text)
    return edit(city, model={"weights": "kde.json"}, **changes)


def refresh(city, full=False):
    """As the flow does, in this process: predict, score, decide, export, remember. Returns why the map is held back."""
    with outputs_lock(city):
        record = infer(city, hold=True, full=full)
        held = record.pop("held", False)
        scored = score_map(city, held=held) if city.labels else None
        reasons = decide(city, map_key(record), scored).reasons if held else ()
        export_published(city)
        record_run(city, record, {"map": scored} if scored else {}, reasons)
        return reasons


def run(command, city, *arguments, code=0):
    done = CliRunner().invoke(app, [command, str(city.root / "city.yaml"), *arguments], env={"COLUMNS": "250"})
    if code == 0:
        assert done.exit_code == 0, (done.output, done.exception)
    else:
        assert isinstance(done.exception, StoreError), (done.output, done.exception)
        assert done.exception.exit_code == code
        assert "\n" not in str(done.exception)
        return str(done.exception)
    return done.stdout


def assert_everything_shows(city, key):
    """Zarr, both COGs, the STAC item, report, history, metrics and scores are of one map."""
    reader, grid = MapReader(city), city.make_grid()
    assert reader.key == key
    export = city.workspace_path / "export"
    for name in ("probability", "road"):
        with rasterio.open(export / f"{city.name}-{name}.tif") as source:
            assert np.array_equal(source.read(1), reader.window(name, 0, 0, *grid.shape)), name
    item = pystac.Item.from_file(str(export / f"{city.name}.json"))
    assert item.properties["roadfuse:map"] == key
    last = read_history(city)[-1]
    assert (last.published, last.record["map"]) == (True, key)
    g_iou = score_city(city).subsets["test"]["g_iou"]
    assert last.g_iou() == g_iou
    metrics = (city.workspace_path / "metrics/roadfuse.prom").read_text()
    assert float(re.search(r"g_iou\{.*\} (.*)", metrics)[1]) == pytest.approx(g_iou)
    assert re.search(r"held_back\{.*\} 0", metrics)


def assert_report_shows(city):
    reader = MapReader(city)
    page = (city.workspace_path / "report/index.html").read_text()
    assert f"map of {reader.record['made']} by" in page
    assert f"{score_city(city).subsets['test']['g_iou']:.3f}" in page


def held_map(city, share=60.0):
    """A published map, and a worse one that waits; both keys, and the city as it is set then."""
    ingest(city)
    assert refresh(city) == ()
    first = MapReader(city).key
    bad = use(city, share)
    assert refresh(bad) != ()
    return bad, first, map_key(waiting(bad))


def test_a_release_publishes_files_report_history_and_metrics_too(city):
    bad, first, second = held_map(city)
    assert MapReader(bad).key == first, "readers see the map before"
    assert not read_history(bad)[-1].published
    said = run("release", bad, "--candidate", second)
    assert "report/index.html" in said
    assert_everything_shows(bad, second)
    assert_report_shows(bad)
    entry = read_history(bad)[-1]
    assert entry.action == "release"
    assert "fell" in entry.reasons[0], "what a person overruled is remembered"
    run("rollback", bad)
    assert_everything_shows(bad, first)
    assert_report_shows(bad)
    assert [e.action for e in read_history(bad)] == ["refresh", "refresh", "release", "rollback"]


def test_a_release_of_another_candidate_than_the_one_looked_at_is_refused(city):
    bad, first, second = held_map(city)
    third = use(bad, 30.0)
    refresh(third)
    now = map_key(waiting(third))
    assert now != second
    assert f"map {now} is held back now, not {second}" in run("release", third, "--candidate", second, code=4)
    assert MapReader(third).key == first
    run("release", third, "--candidate", now)
    assert_everything_shows(third, now)
    run("release", third, code=4)


def test_a_candidate_that_nobody_scored_is_not_published_by_the_gate(city):
    """Between scoring and deciding, another process left another candidate."""
    ingest(city)
    refresh(city)
    first = MapReader(city).key
    good = use(city, 0.06)
    scored_key = map_key(infer(good, hold=True))
    scored = score_map(good, held=True)
    bad = use(city, 60.0)
    infer(bad, hold=True)
    with pytest.raises(StoreError, match=f"is held back now, not {scored_key}"):
        decide(good, scored_key, scored)
    assert MapReader(city).key == first


STEPS = ["publish_candidate", "export_published", "write_report", "append_history", "write_metrics"]


class Killed(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("command", ["release", "rollback"])
def test_what_is_interrupted_is_finished_when_it_is_run_again(city, monkeypatch, command, step):
    """Killed before each step: the same command again ends with everything at the map that was asked for."""
    bad, first, second = held_map(city)
    wanted = second
    if command == "rollback":
        run("release", bad)
        wanted, step = first, step.replace("publish_candidate", "rollback")

    def dies(*arguments, **named):
        if step == "rollback" and named.get("dry_run"):
            return real(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patched:
        real = getattr(publication, step)
        patched.setattr(publication, step, dies)
        with pytest.raises(Killed):
            getattr(publication, "release" if command == "release" else "roll_back")(bad)
    run(command, bad)
    assert_everything_shows(bad, wanted)
    assert_report_shows(bad)
    keys = [e.record["map"] for e in read_history(bad) if e.published]
    assert keys == [first, second, *([first] if command == "rollback" else [])], "each once"


def test_an_interrupted_rollback_goes_back_once(city, monkeypatch):
    """Of three maps: the second rollback finishes the first one, and only the third goes on to the map before."""
    ingest(city)
    keys = []
    for threshold in (0.05, 0.06, 0.07):
        city = use(city, threshold)
        assert refresh(city) == ()
        keys.append(MapReader(city).key)
    with monkeypatch.context() as patched:
        patched.setattr(publication, "export_published", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            publication.roll_back(city)
    assert "had been interrupted" in run("rollback", city)
    assert_everything_shows(city, keys[1])
    assert "had been interrupted" not in run("rollback", city)
    assert_everything_shows(city, keys[0])


def test_a_refresh_that_changes_nothing_makes_files_of_another_map_again(city):
    """Killed between publishing and exporting, or a file is lost: the next refresh notices, and touches nothing else."""
    ingest(city)
    refresh(city)
    other = use(city, 0.06)
    record = infer(other, hold=True)
    decide(other, map_key(record), score_map(other, held=True))  # and then the process ended
    assert refresh(other) == ()
    assert_everything_shows(other, map_key(record))
    road = other.workspace_path / f"export/{other.name}-road.tif"
    before = road.stat().st_mtime_ns
    refresh(other)
    assert road.stat().st_mtime_ns == before, "files that show the map stay"
    road.unlink()
    refresh(other)
    assert_everything_shows(other, map_key(record))


def test_files_stay_with_the_published_map_while_another_one_is_held_back(city):
    bad, first, _ = held_map(city)
    assert export_published(bad)["stac item"].is_file()
    item = json.loads((bad.workspace_path / f"export/{bad.name}.json").read_text())
    assert item["properties"]["roadfuse:map"] == first


def test_a_map_without_a_tag_after_a_crash_is_no_gap_for_a_rollback(city, monkeypatch):
    """Killed between moving `main` and tagging, twice in a row, with kernel density beside it as a refresh makes it."""
    ingest(city)
    keys, publish = [], publishing.publish

    def dies(*arguments):
        publish(*arguments)
        raise Killed

    for threshold in (0.05, 0.06, 0.07):
        city = use(city, threshold)
        if keys:
            with monkeypatch.context() as patched:
                patched.setattr(publishing, "publish", dies)
                with pytest.raises(Killed):
                    infer(city)
        else:
            infer(city)
        keys.append(MapReader(city).key)
        if len(keys) == 2:
            infer(city, "kde", "baseline")
    assert len(set(keys)) == 3
    planned = rollback(city, dry_run=True)
    assert rollback(city) == planned
    assert MapReader(city).key == keys[1]
    forward = [t for t, _ in published(city) if publication.tagged_record(city, t)["digest"] == keys[2].split("-")[0]]
    assert len(forward) == 1, "the map that was left can be found too"
    rollback(city)
    assert MapReader(city).key == keys[0]


def test_a_clock_that_was_set_back_does_not_change_what_came_before(city, monkeypatch):
    ingest(city)
    keys = []
    for threshold, hour in ((0.05, 10), (0.06, 15), (0.07, 7)):
        clock = type(
            "Clock", (datetime,), {"now": classmethod(lambda cls, tz=None, h=hour: datetime(2026, 3, 1, h, tzinfo=UTC))}
        )
        monkeypatch.setattr(publishing, "datetime", clock)
        city = use(city, threshold)
        infer(city)
        keys.append(MapReader(city).key)
    assert [t.removeprefix("map-20260301T")[:2] for t, _ in published(city)] == ["07", "15", "10"]
    rollback(city)
    assert MapReader(city).key == keys[1]
    rollback(city)
    assert MapReader(city).key == keys[0]


def test_a_rollback_after_expiry_keeps_a_way_to_the_map_that_it_leaves(city):
    ingest(city)
    for threshold in (0.05, 0.06):
        city = use(city, threshold)
        infer(city)
    last = MapReader(city).key
    rollback(city)
    tags = [t for t, _ in published(city)]
    rollback(city, tags[1])
    assert MapReader(city).key == last
    expire(city, datetime.now(UTC).replace(year=2100))
    with pytest.raises(StoreError, match="no earlier map"):
        rollback(city)


def test_a_release_or_rollback_beside_a_run_is_refused_at_its_start(city):
    ingest(city)
    refresh(city)
    code = f"""
from pathlib import Path
from roadfuse_core.publication import outputs_lock
from roadfuse_core.settings import load_city
with outputs_lock(load_city(Path({str(city.root / "city.yaml")!r}))):
    print("on", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"on\n"
        for command in ("release", "rollback"):
            assert re.search(rf"process {other.pid} on \S+ \(.*\) is writing there", run(command, city, code=4))
        other.communicate(b"\n")
    refresh(city)


def test_a_full_disk_at_a_rollback_is_told_as_what_it_is(city, small_disk, fill):
    place = small_disk("60m")
    city = edit(city, workspace=str(place / "work"))
    ingest(city)
    for threshold in (0.05, 0.06):
        city = use(city, threshold)
        refresh(city)
    key = MapReader(city).key
    fill(place / "rest")
    with pytest.raises(StoreError, match="cannot be written"):
        rollback(city)
    with pytest.raises(StoreError, match="cannot be written"):
        publication.roll_back(city)
    assert MapReader(city).key == key
    (place / "rest").unlink()
    run("rollback", city)
    assert_everything_shows(city, MapReader(city).key)
    assert MapReader(city).key != key


def test_a_workspace_of_before_gets_its_files_and_figures(city):
    """Maps that were published without scores, keys or reference: a release and a rollback of them work."""
    ingest(city)
    infer(city)  # publishes as the version before did: no scores in the record, no exports
    first = MapReader(city).key
    entry = {"made": "2026-03-01T00:00:00+00:00", "published": True, "record": {"windows": 1}, "scores": {"map": {"test": {"g_iou": float("nan")}}},
             "seconds": 1.5, "windows_failed": 0}  # fmt: skip
    (city.workspace_path / "history.jsonl").write_text(json.dumps(entry) + "\n")
    bad = use(city, 60.0)
    assert "fell" in refresh(bad)[0]
    assert read_history(bad)[0].g_iou() is None
    run("release", bad)
    run("rollback", bad)
    assert_everything_shows(bad, first)


def test_the_committer_lock_is_free_while_outputs_are_written(city):
    with outputs_lock(city), committer_lock(city.workspace_path):
        pass
