"""A failed look at the cube is never an empty ledger, and nothing is deleted that no ingest wrote."""

import contextlib
import shutil
from pathlib import Path
from unittest import mock

import icechunk
import pytest
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import _plan as planning
from roadfuse_core.cubes import cubes_path, expire, ingest, ledger
from roadfuse_core.errors import RoadFuseError, StoreError
from tests.unit.test_hostile import age, city, state, write  # noqa: F401


def run(*words) -> tuple[int, str]:
    """Exit code and message of a command; its work is done in this process, which costs no start of workers."""
    with mock.patch("roadfuse_core.cluster.open_cluster", return_value=contextlib.nullcontext()):
        done = CliRunner().invoke(app, [*map(str, words)])
    if isinstance(done.exception, RoadFuseError):
        return done.exception.exit_code, str(done.exception)
    assert not done.exception or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def shards(city) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted((city.workspace_path / "shards").rglob("*")) if p.is_file()}


def test_whichever_open_of_the_cube_fails_nothing_is_counted_twice_or_swept(city, monkeypatch):
    ingest(city)
    before, kept, real = state(city), shards(city), icechunk.Repository.open
    write(city.root / "more.parquet", 2, 1003)
    failures, opened = 0, 0
    for nth in range(100):
        calls = []

        def fails(*words, nth=nth, calls=calls, **named):
            calls.append(1)
            if len(calls) == nth + 1:
                raise icechunk.IcechunkError("Too many open files (os error 24)")
            return real(*words, **named)

        monkeypatch.setattr(icechunk.Repository, "open", fails)
        told = ""
        try:
            ingest(city, ["good.parquet", "more.parquet"])
        except StoreError as error:
            told = str(error)
        assert "Too many open files" in told or len(calls) <= nth
        failures += bool(told)
        monkeypatch.setattr(icechunk.Repository, "open", real)
        opened = len(calls)
        assert sum(e["rows"] for e in ledger(city).values()) in (5000, 6003)
        assert kept.items() <= shards(city).items()
        if state(city)[2] != before[2] or nth >= opened:
            break
        assert state(city) == before
    assert failures >= 2
    ingest(city, ["good.parquet", "more.parquet"])
    assert sum(e["rows"] for e in ledger(city).values()) == 6003
    assert sum(map(sum, state(city)[1])) == sum(e["kept"] for e in ledger(city).values())


LOST = {"the cube": "", "its branches": "refs", "its snapshots": "snapshots"}


@pytest.mark.parametrize("what", LOST)
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "of an earlier version"])
def test_a_cube_that_was_there_and_is_lost_is_no_empty_city(city, what, marked):
    ingest(city)
    before, kept = state(city), shards(city)
    if not marked:
        (city.workspace_path / "workspace.json").unlink()
    place, aside = cubes_path(city) / LOST[what], city.root / "aside"
    place.rename(aside)
    write(city.root / "more.parquet", 2, 1003)
    file = city.root / "city.yaml"
    for words in (("status", file), ("ingest", file), ("ingest", file, "more.parquet"), ("ingest", file, "--dry-run"),
                  ("expire", file, "--older-than", 0), ("export", file, "count", "--out", city.root / "c.tif")):  # fmt: skip
        code, told = run(*words)
        assert code == 4, (words, told)
        assert str(cubes_path(city)) in told
    with pytest.raises(StoreError):
        expire(city, age(city))
    assert shards(city) == kept
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)
    assert state(city) == before
    assert ingest(city) is None
    assert ingest(city, ["more.parquet"])["rows"] == 1003
    assert sum(e["rows"] for e in ledger(city).values()) == 6003


def test_a_workspace_of_an_earlier_version_counts_nothing_twice(city):
    ingest(city)
    (city.workspace_path / "workspace.json").unlink()
    before = state(city)
    assert ingest(city) is None
    assert state(city) == before
    assert ingest(city, [write(city.root / "more.parquet", 2, 1003).name])["rows"] == 1003


def test_the_commit_itself_refuses_a_file_that_the_cube_holds(city, monkeypatch):
    ingest(city)
    before = state(city)
    write(city.root / "more.parquet", 2, 1003)
    with monkeypatch.context() as patched:
        patched.setattr(planning, "ledger", lambda _: {})
        with pytest.raises(StoreError, match=r"good\.parquet: the cube holds this file already, in dump"):
            ingest(city, ["good.parquet", "more.parquet"])
    assert state(city) == before
    assert ingest(city, ["good.parquet", "more.parquet"])["rows"] == 1003


def test_what_no_ingest_wrote_is_never_deleted(city):
    """A workspace on a folder that others use, and shards beside which somebody put a note."""
    work = city.workspace_path
    others = ["shards/mine/photo.jpg", "shards/0123456789ab-0123456789ab/photo.jpg", "scratch/music/a.txt", "scratch/a.txt",
              "shards/notes.txt", "shards/unpacked/a.csv", "photo.jpg", "export/x.tif"]  # fmt: skip
    for name in others:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    entry = ingest(city)
    note = work / "shards" / entry["shards"] / "note.txt"
    note.write_text("mine")
    (work / "shards/ba9876543210-0123456789ab").mkdir()
    (work / "shards/ba9876543210-0123456789ab/shard-00000.json").write_text("{}")
    assert ingest(city, [write(city.root / "more.parquet", 2, 1003).name])["rows"] == 1003
    assert not (work / "shards/ba9876543210-0123456789ab").exists(), "what a crash left goes"
    expire(city, age(city))
    assert {name: (work / name).read_text() for name in others} == {name: name for name in others}
    assert note.read_text() == "mine"


def test_serving_wants_a_workspace_that_exists(city, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    file = city.root / "city.yaml"
    code, told = run("serve", file)
    assert (code, city.workspace_path.exists()) == (2, False)
    assert "workspace" in told
    assert "does not exist" in told
    city.workspace_path.mkdir()
    (city.workspace_path / "photo.jpg").write_text("x")
    code, told = run("serve", file)
    assert code == 2
    assert "never used" in told
    assert [p.name for p in city.workspace_path.iterdir()] == ["photo.jpg"]


def test_a_scheduled_run_makes_no_workspace(city, monkeypatch):
    """The flows as Prefect calls them in a run of a deployment, without a server for the run's states."""
    from flows.refresh import refresh
    from flows.watch import watch

    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "of-a-schedule")
    file = Path(city.root / "city.yaml")
    for flow in (refresh, watch):
        with pytest.raises(RoadFuseError, match=r"workspace: .* does not exist, and a scheduled run makes none"):
            flow.fn(file)
        assert not city.workspace_path.exists()
    ingest(city)
    assert watch.fn(file) is None
