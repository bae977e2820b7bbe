"""What an interrupted ingest left is taken if it is what was written, and made again otherwise."""

import dataclasses
import json
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import yaml

from roadfuse_core.cubes import _ingest as ingesting
from roadfuse_core.cubes import _plan as planning
from roadfuse_core.cubes import cubes_path, ingest, ledger
from roadfuse_core.errors import DataError, StoreError
from roadfuse_core.files import read_record
from roadfuse_core.settings import load_city
from tests.unit.test_cubes import contents
from tests.unit.test_hostile import city, write  # noqa: F401

DAMAGES = {
    "empty": lambda b: b"",
    "cut": lambda b: b[: len(b) // 2],
    "zeroed": lambda b: b"\0" * len(b),
    "flipped": lambda b: b[: len(b) // 3] + bytes([b[len(b) // 3] ^ 0x11]) + b[len(b) // 3 + 1 :],
}
KINDS = {"report": "shard-*.json", "shard": "shard-*.samples", "shuffled": "shuffle-*.parquet", "unpacked": "unpacked/*.csv",
         "record of the shuffle": "shuffle-*.json", "record of the slices": "slices.json"}  # fmt: skip


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """2,003 rows of 401 vehicles in two members of a zip, cut into slices of at most 501 rows and shuffled."""
    monkeypatch.setattr(planning, "ROWS_PER_SLICE", 501)
    rng = np.random.default_rng(5)
    n = 2003
    table = pa.table({"car": rng.integers(0, 401, n), "lon": 13 + 0.01 * rng.random(n), "lat": 47 + 0.01 * rng.random(n),
                      "t": 1_770_000_000 + np.arange(n) * 60})  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rows in (("1.csv", table.slice(0, 700)), ("2.csv", table.slice(700))):
            pa.csv.write_csv(rows, tmp_path / name)
            archive.write(tmp_path / name, name)
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": ["a.zip"], "columns": {"vehicle": "car", "lon": "lon", "lat": "lat", "time": "t"}},
    }  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(tmp_path / "city.yaml")


def interrupt(city, monkeypatch):
    """An ingest that ends when all slices are done and nothing is published; returns the folder that it leaves."""

    def lost(*_):
        raise StoreError("the power went")

    with monkeypatch.context() as patched:
        patched.setattr(ingesting, "_reduce", lost)
        with pytest.raises(StoreError, match="the power went"):
            ingest(city)
    assert ledger(city) == {}
    (folder,) = (city.workspace_path / "shards").iterdir()
    return folder


CASES = [("report", "cut"), ("report", "zeroed"), ("shard", "empty"), ("shard", "flipped"), ("shuffled", "flipped"),
         ("shuffled", "zeroed"), ("unpacked", "cut"), ("record of the shuffle", "zeroed"), ("record of the slices", "empty")]  # fmt: skip


def test_what_is_damaged_is_made_again(fleet, monkeypatch):
    whole = fleet.model_copy(update={"workspace": "undisturbed"})
    entry = ingest(whole)
    expected = contents(whole)
    interrupt(fleet, monkeypatch)
    for kind, damage in CASES:
        one = fleet.model_copy(update={"workspace": f"{kind} {damage}"})
        shutil.copytree(fleet.workspace_path, one.workspace_path)
        paths = sorted((one.workspace_path / "shards").glob(f"*/{KINDS[kind]}"))
        assert paths, kind
        for path in paths[-2:]:
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
        made = {p.name: p.stat().st_mtime_ns for p in (one.workspace_path / "shards").glob("*/shard-*.json")}
        got = ingest(one)
        again = {p.name: p.stat().st_mtime_ns for p in (one.workspace_path / "shards").glob("*/shard-*.json")}
        untouched = len(made.items() & again.items())
        assert untouched == {"report": len(made) - 2, "shard": len(made) - 2, "record of the slices": 0}.get(kind, len(made))
        assert (got["rows"], got["kept"], got["rejected"]) == (2003, entry["kept"], entry["rejected"]), (kind, damage)
        assert contents(one) == expected, (kind, damage)


def test_an_ingest_goes_on_on_a_machine_with_other_cores(fleet, monkeypatch):
    monkeypatch.setattr(planning, "LEAST_ROWS_PER_SLICE", 50)
    workers = {n: fleet.model_copy(update={"cluster": fleet.cluster.model_copy(update={"workers": n})}) for n in (1, 3)}
    assert planning.plan_ingest(workers[1]).slices != planning.plan_ingest(workers[3]).slices
    folder = interrupt(workers[3], monkeypatch)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*") if p.is_file()}
    assert len(before) > 4
    entry = ingest(workers[1])
    assert entry["shards"] == folder.name
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*") if p.is_file()} == before, (
        "all slices are taken, none is made"
    )
    assert entry["rows"] == 2003


def test_slices_that_are_too_large_for_this_machine_are_made_again(fleet, monkeypatch):
    interrupt(fleet, monkeypatch)
    monkeypatch.setattr(planning, "ROWS_PER_SLICE", 300)
    whole = fleet.model_copy(update={"workspace": "undisturbed"})
    ingest(whole)
    assert ingest(fleet)["rows"] == 2003
    assert contents(fleet) == contents(whole)


def test_two_versions_of_the_code_are_not_mixed(fleet, monkeypatch):
    folder = interrupt(fleet, monkeypatch)
    monkeypatch.setattr(ingesting, "_software", lambda: ["the next version"])
    entry = ingest(fleet)
    assert entry["shards"] != folder.name
    assert entry["rows"] == 2003
    assert [p.name for p in (fleet.workspace_path / "shards").iterdir()] == [entry["shards"]]


def test_a_dump_of_an_earlier_version_can_still_leave(city):
    """Its reports were plain JSON without digests, and its workspace had no marker."""
    first = ingest(city)
    folder = city.workspace_path / "shards" / first["shards"]
    for path in folder.glob("*.json"):
        if path.name.startswith("shard-"):
            record = read_record(path)
            names = [f.name for f in dataclasses.fields(ingesting.SliceReport) if f.name != "digests"]
            path.write_text(json.dumps({name: record[name] for name in names}))
        else:
            path.unlink()
    (city.workspace_path / "workspace.json").unlink()
    write(city.root / "more.parquet", 2, 1003)
    assert ingest(city) is None
    entry = ingest(city, ["more.parquet"], replace=first["dump"])
    assert list(ledger(city)) == [entry["dump"]]
    only = city.model_copy(update={"workspace": "undisturbed"})
    ingest(only, ["more.parquet"])
    assert contents(city) == contents(only)


def test_contributions_that_are_damaged_cannot_leave_and_the_line_says_so(city):
    first = ingest(city)
    before = contents(city)
    write(city.root / "more.parquet", 2, 1003)
    folder = city.workspace_path / "shards" / first["shards"]
    for path, damage in ((next(folder.glob("*.samples")), "zeroed"), (next(folder.glob("shard-*.json")), "cut")):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        with pytest.raises(StoreError, match=f"contributions of dump {first['dump']}.*cannot leave; bring them back"):
            ingest(city, ["more.parquet"], replace=first["dump"])
    assert contents(city) == before


def test_a_zip_bomb_is_refused_and_leaves_nothing(city):
    row = b"lon,lat,t\n13.001,47.001,2026-03-01T00:00:00\n"
    with zipfile.ZipFile(city.root / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", row + b"13.001,47.001,2026-03-01T00:00:00\n" * 4_000_000)
    with pytest.raises(DataError, match=r"bomb\.zip::a\.csv would unpack [\d,]+ bytes to 136,000,\d+, more than 100 times"):
        ingest(city, ["bomb.zip"])
    assert not cubes_path(city).exists()
    assert not list((city.workspace_path).rglob("*.part"))


def test_a_member_without_room_leaves_nothing(city, small_disk):
    disk = small_disk("2m")
    full = city.model_copy(update={"workspace": str(disk / "work")})
    rng = np.random.default_rng(1)
    with zipfile.ZipFile(city.root / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        lines = [f"{13 + 0.01 * x:.9f},{47 + 0.01 * y:.9f},2026-03-01T00:00:00" for x, y in rng.random((60_000, 2))]
        archive.writestr("a.csv", "lon,lat,t\n" + "\n".join(lines))
    with pytest.raises(StoreError, match=r"cannot be written .*no space left.*make room"):
        ingest(full, ["large.zip"])
    assert not [p for p in (disk / "work").rglob("*") if p.suffix in (".part", ".csv")]
