"""A damaged, young or changing file is left out and listed; the others enter, and it does once it is right."""

import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from roadfuse_core.cubes import ingest, ledger, plan_ingest, read_skipped
from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.settings import load_city
from tests.unit.test_cubes import contents
from tests.unit.test_hostile import broken_page, state, truncated, write
from tests.unit.test_hostile import city as plain_city  # noqa: F401
from tests.unit.test_ledger import run

ROW = b"lon,lat,t\n13.001,47.001,2026-03-01T00:00:00\n"


def with_sources(city, *sources, **points):
    path = city.root / "city.yaml"
    spec = yaml.safe_load(path.read_text())
    spec["points"] |= {"sources": list(sources)} | points
    spec["cluster"] = {"kind": "local", "workers": 1, "memory_gib": 2}
    path.write_text(yaml.safe_dump(spec))
    return load_city(path)


@pytest.fixture
def city(plain_city):
    """One good dump, and whatever lies beside it in `in`."""
    (plain_city.root / "in").mkdir()
    (plain_city.root / "good.parquet").rename(plain_city.root / "in/good.parquet")
    return with_sources(plain_city, "in/*")


def cut_zip(path: Path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", ROW * 50)
    path.write_bytes(path.read_bytes()[:-30])


def half_a_header(path: Path):
    path.write_bytes(b"lon,la")


def not_utf8_inside(path: Path):
    path.write_bytes(ROW + b"13.002,47.002,2026-03-01T00:00:00\n" * 30_000 + b"\xff\xfe,47.001,\n")


DAMAGED = {"cut": (truncated, "b.parquet"), "broken inside": (broken_page, "b.parquet"), "cut zip": (cut_zip, "b.zip"),
           "half a header": (half_a_header, "b.csv"), "not UTF-8 inside": (not_utf8_inside, "b.csv")}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_left_out_until_it_is_right(city, kind):
    make, name = DAMAGED[kind]
    path = city.root / "in" / name
    make(path)
    (city.root / "in/c.csv").write_bytes(ROW)
    code, told = run("ingest", city.root / "city.yaml")
    assert code == 0
    assert "left out: points." in told
    (entry,) = ledger(city).values()
    assert sorted(Path(f["path"]).name for f in entry["files"]) == ["c.csv", "good.parquet"]
    assert [Path(s["label"].partition("::")[0]).name for s in entry["skipped"]] == [name]
    assert (entry["rows"], [name in s.reason for s in read_skipped(city)]) == (5001, [True])
    assert "left out" in run("status", city.root / "city.yaml")[1]
    assert run("check", city.root / "city.yaml")[0] == 0
    before = state(city)
    assert plan_ingest(city).files == [], "a poll finds nothing to do"
    code, told = run("ingest", city.root / "city.yaml")
    assert (code, name in told) == (3, True), "nothing new that is right: no success"
    assert state(city) == before
    path.unlink()
    write(city.root / "in/b.parquet", 9, 703)
    assert run("ingest", city.root / "city.yaml")[0] == 0
    assert [e["rows"] for e in ledger(city).values()] == [5001, 703]
    assert read_skipped(city) == []


def test_where_no_file_is_right_it_is_an_error(city):
    (city.root / "in/good.parquet").unlink()
    truncated(city.root / "in/b.parquet")
    for command in ("check", "ingest"):
        code, told = run(command, city.root / "city.yaml")
        assert code in (2, 3)
        assert "is not readable Parquet" in told


def test_a_file_that_the_disk_could_not_read_once_is_tried_again(city):
    path = city.root / "in/b.parquet"
    broken_page(path)
    broken, at = path.read_bytes(), path.stat()
    ingest(city)
    assert [s.damaged for s in read_skipped(city)] == [True]
    whole = write(path, 2).read_bytes()
    assert len(whole) == len(broken)
    os.utime(path, ns=(at.st_mtime_ns, at.st_mtime_ns))
    assert plan_ingest(city).files == []
    assert ingest(city)["rows"] == 5000
    assert read_skipped(city) == []


def test_young_files_wait(city):
    city = with_sources(city, "in/*", settle_s=600)
    os.utime(city.root / "in/good.parquet", (time.time() - 700, time.time() - 700))
    write(city.root / "in/b.parquet", 2, 703)
    code, told = run("ingest", city.root / "city.yaml")
    assert code == 0
    assert "points.settle_s is 600; a later run takes it" in " ".join(told.split())
    assert [e["rows"] for e in ledger(city).values()] == [5000]
    assert run("ingest", city.root / "city.yaml")[0] == 0, "to wait is no mistake"
    assert ingest(city, ["in/b.parquet"])["rows"] == 703, "a file that is named is taken"
    ledger_before = len(ledger(city))
    write(city.root / "in/c.parquet", 3, 301)
    assert ingest(city) is None
    os.utime(city.root / "in/c.parquet", (time.time() - 700, time.time() - 700))
    assert ingest(city)["rows"] == 301
    assert len(ledger(city)) == ledger_before + 1


def growing(path: Path):
    """Progress that appends to a file as soon as its rows are being read."""
    done = []

    def tell(what, *_):
        if what == "reading points" and not done:
            done.append(1)
            with path.open("ab") as file:
                file.write(b"13.003,47.003,2026-03-01T00:00:0")

    return tell


def test_a_file_that_changes_while_it_is_read_is_left_out(city):
    (city.root / "in/log.csv").write_bytes(ROW * 3)
    entry = ingest(city, tell=growing(city.root / "in/log.csv"))
    assert [Path(f["path"]).name for f in entry["files"]] == ["good.parquet"]
    assert "log.csv changed while it was read" in read_skipped(city)[0].reason
    (city.root / "in/log.csv").write_bytes(ROW)
    assert ingest(city)["rows"] == 1
    assert sum(e["rows"] for e in ledger(city).values()) == 5001


def test_a_file_that_was_named_and_changes_while_it_is_read_is_refused(city):
    ingest(city)
    before = state(city)
    (city.root / "log.csv").write_bytes(ROW)
    with pytest.raises(DataError, match=r"log\.csv changed while it was read"):
        ingest(city, ["log.csv"], tell=growing(city.root / "log.csv"))
    assert state(city) == before
    (city.root / "log.csv").write_bytes(ROW)
    assert ingest(city, ["log.csv"])["rows"] == 1, "what was read of the longer one is not taken"


def test_a_file_that_changed_after_it_was_ingested_does_not_stop_the_others(city):
    (city.root / "in/log.csv").write_bytes(ROW)
    ingest(city)
    (city.root / "in/log.csv").write_bytes(ROW + b"13.002,47.002,2026-03-01T00:00:00\n")
    write(city.root / "in/b.parquet", 2, 703)
    assert ingest(city)["rows"] == 703
    assert "log.csv was ingested with other content" in read_skipped(city)[0].reason


def test_sources_whose_files_were_archived_after_their_ingest_are_a_note(city):
    ingest(city)
    expected = contents(city)
    (city.root / "in/good.parquet").rename(city.root / "archived.parquet")
    for words in (("ingest", city.root / "city.yaml"), ("check", city.root / "city.yaml")):
        code, told = run(*words)
        assert code == 0, told
        assert "match" in told
        assert "in the ledger" in " ".join(told.split())
    write(city.root / "more.parquet", 3, 301)
    both = with_sources(city, "in/*", "more.parquet")
    assert ingest(both)["rows"] == 301
    assert contents(both) != expected
    with pytest.raises(ConfigError, match="matches no file"):
        ingest(with_sources(city, "in/*", "never/*"))


def test_a_backfill_does_not_fail_by_broken_files_that_lie_elsewhere(city):
    stamps = np.datetime64("2030-01-01", "us") + np.arange(703).astype("timedelta64[s]")
    later = write(city.root / "in/later.parquet", 4, 703, t=stamps)
    content = bytearray(later.read_bytes())
    content[4:64] = b"\xff" * 60
    later.write_bytes(bytes(content))
    not_utf8_inside(city.root / "in/b.csv")
    text = (city.root / "in/b.csv").read_bytes().replace(b"2026-03-01", b"2030-03-01")
    (city.root / "in/b.csv").write_bytes(text)
    truncated(city.root / "in/c.parquet")
    code, told = run("backfill", city.root / "city.yaml", "--from", "2026-03-01", "--to", "2026-03-20")
    assert code == 0, told
    assert [e["rows"] for e in ledger(city).values()] == [5000]
