"""Hostile dumps and full disks: one line with what, where and the fix, and a cube exactly as before."""

import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.cubes import CubeReader, cubes_path, expire, ingest, ledger, open_repository, snapshots
from roadfuse_core.errors import DataError, RoadFuseError, StoreError
from roadfuse_core.locks import COMMITTER, INGEST, MAP, waiting_lock
from roadfuse_core.settings import City, load_city


@pytest.fixture
def city(tmp_path) -> City:
    write(tmp_path / "good.parquet", 1)
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": ["good.parquet"], "columns": {"lon": "lon", "lat": "lat", "time": "t"}},
    }  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(tmp_path / "city.yaml")


def write(path: Path, seed: int, rows: int = 5000, **more) -> Path:
    rng = np.random.default_rng(seed)
    stamps = np.datetime64("2026-03-01", "us") + rng.integers(0, 10**12, rows).astype("timedelta64[us]")
    pq.write_table(
        pa.table({"lon": 13 + 0.01 * rng.random(rows), "lat": 47 + 0.01 * rng.random(rows), "t": stamps} | more), path
    )
    return path


def state(city: City):
    cube = CubeReader(cubes_path(city))
    return cube.snapshot, cube.window("count", 0, 0, *city.make_grid().shape).tolist(), list(ledger(city))


def truncated(path: Path):
    whole = write(path, 2).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def wrong_magic(path: Path):
    path.write_bytes(b"RIFF" + write(path, 2).read_bytes()[4:-4] + b"RIFF")


def broken_page(path: Path):
    whole = bytearray(write(path, 2).read_bytes())
    whole[4:64] = b"\xff" * 60
    path.write_bytes(bytes(whole))


def other_type(path: Path):
    pq.write_table(pa.table({"lon": [[13.0]], "lat": [47.0], "t": [0]}), path)


def other_name(path: Path):
    pq.write_table(pa.table({"longitude": [13.0], "lat": [47.0], "t": [0]}), path)


def many_columns(path: Path):
    path.write_text(",".join(f"c{k}" for k in range(1_000_000)) + "\n" + "," * 999_999 + "\n")


def enormous_cell(path: Path):
    with open(path, "w") as file:
        file.write("lon,lat,t\n13.001,47.001,2026-03-01T00:00:00\n" + '"')
        for _ in range(64):
            file.write("x" * (1 << 20))
        file.write('",47.001,2026-03-01T00:00:00\n')


def not_text(path: Path):
    path.write_bytes(os.urandom(5000))


def empty(path: Path):
    path.write_bytes(b"")


HOSTILE = {
    "truncated": (truncated, "bad.parquet", "is not readable Parquet"),
    "wrong magic": (wrong_magic, "bad.parquet", "is not readable Parquet"),
    "broken page": (broken_page, "bad.parquet", "cannot read"),
    "another type": (other_type, "bad.parquet", "has type list"),
    "another name": (other_name, "bad.parquet", "is not a column"),
    "a million columns": (many_columns, "bad.csv", "is not a column"),
    "an enormous cell": (enormous_cell, "bad.csv", "cannot read"),
    "not text": (not_text, "bad.csv", "not"),
    "empty text": (empty, "bad.csv", "is not a column"),
    "empty Parquet": (empty, "bad.parquet", "is not readable Parquet"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_leave_the_cube_as_it_was(city, kind):
    make, name, message = HOSTILE[kind]
    ingest(city)
    before = state(city)
    make(city.root / name)
    with pytest.raises(RoadFuseError, match=message) as caught:
        ingest(city, [name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert name in str(caught.value)
    assert state(city) == before
    write(city.root / "next.parquet", 3)
    assert ingest(city, ["next.parquet"])["rows"] == 5000


def test_of_several_files_the_damaged_one_is_named(city):
    """It is found in the midst of reading, where Arrow tells what DuckDB found."""
    row = b"lon,lat,t\n13.001,47.001,2026-03-01T00:00:00\n"
    for name, more in (("a.csv", b""), ("b.csv", b"\xff\xfe,47.001,\n"), ("c.csv", b"13.003,47.003,2026-03-01T00:00:00\n")):
        (city.root / name).write_bytes(row + row.splitlines(keepends=True)[1] * 2000 + more)
    with pytest.raises(DataError, match=r"^points\.sources: cannot read [^ ]*b\.csv \("):
        ingest(city, ["?.csv"])


@pytest.mark.slow
def test_a_cell_of_a_gigabyte_and_a_million_parquet_columns(city):
    ingest(city)
    before = state(city)
    rows = 3
    cell = pa.array([b"x" * (1 << 30), b"", b""], pa.large_binary())
    beside = write(city.root / "cell.parquet", 2, rows, note=cell)
    assert ingest(city, [beside.name])["rows"] == rows  # a column that nobody reads does no harm
    pq.write_table(pa.table({f"c{k}": [0] for k in range(1_000_000)}), city.root / "wide.parquet")
    middle = state(city)
    with pytest.raises(RoadFuseError, match="is not readable Parquet"):
        ingest(city, ["wide.parquet"])
    assert state(city) == middle != before


def test_links_in_circles_and_twice_are_read_once(city):
    folder = city.root / "dumps"
    (folder / "inner").mkdir(parents=True)
    write(folder / "inner" / "a.parquet", 5)
    (folder / "inner" / "again").symlink_to(folder)
    (folder / "b.parquet").symlink_to(folder / "inner" / "a.parquet")
    (folder / "c.parquet").symlink_to(folder / "c.parquet")
    for source in ("dumps", "dumps/**/*.parquet"):
        entry = ingest(city.model_copy(update={"workspace": f"w-{len(source)}"}), [source])
        assert (len(entry["files"]), entry["rows"]) == (1, 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(city):
    path = write(city.root / "locked.parquet", 2)
    path.chmod(0)
    with pytest.raises(RoadFuseError, match=r"locked\.parquet"):
        ingest(city, [path.name])


def test_a_full_disk_leaves_the_cube_as_it_was(city, small_disk, fill):
    disk = small_disk("3m")
    full = city.model_copy(update={"workspace": str(disk / "work")})
    ingest(full)
    before = state(full)
    write(city.root / "large.parquet", 6, 200_000)
    fill(disk / "filler")
    for free in (0, 100_000, 400_000):  # runs out while mapping, and later
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - free)
        with pytest.raises(StoreError, match=r"cannot be written .*o space.*run again"):
            ingest(full, ["large.parquet"])
        assert state(full) == before
    (disk / "filler").unlink()
    assert ingest(full, ["large.parquet"])["rows"] == 200_000


def test_a_plan_that_does_not_fit_is_refused_with_both_numbers(city):
    tight = city.model_copy(update={"cluster": city.cluster.model_copy(update={"memory_gib": 0.25})})
    with pytest.raises(RoadFuseError, match=r"cluster\.memory_gib: 0\.25 is less than the \d\.\d\d GiB .* raise it"):
        ingest(tight)
    assert not (city.workspace_path / "cubes").exists()


def test_too_many_rejected_rows_stop_a_dump(city):
    limits = city.points.clean.model_copy(update={"stop_above": {"time": 0.4}})
    careful = city.model_copy(update={"points": city.points.model_copy(update={"clean": limits})})
    pq.write_table(pa.table({"lon": [13.001] * 4, "lat": [47.001] * 4, "t": pa.array([None, None, 0, 0], pa.timestamp("us"))}),
                   city.root / "half.parquet")  # fmt: skip
    with pytest.raises(RoadFuseError, match=r"stop_above\.time: 0\.4 is exceeded: 2 of 4"):
        ingest(careful, ["half.parquet"])
    assert ingest(city, ["half.parquet"])["rejected"] == {"time": 2}


def test_a_cube_of_an_earlier_version_is_refused(city):
    import zarr

    ingest(city)
    session = open_repository(cubes_path(city)).writable_session("main")
    zarr.open_group(session.store).attrs["format"] = 1
    session.commit("older")
    with pytest.raises(StoreError, match="earlier version; ingest anew"):
        ingest(city, [write(city.root / "x.parquet", 9).name])


def age(city: City) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=1)


def test_expiry_keeps_the_cube_and_the_ledger_and_sweeps_the_rest(city):
    for seed in (1, 2, 3):
        ingest(city, [write(city.root / f"{seed}.parquet", seed).name])
    (city.workspace_path / "shards/0123456789ab-0123456789ab").mkdir()
    newest, counts, dumps = state(city)
    told = expire(city, age(city), dry_run=True)
    assert (told.snapshots >= 2, told.leftovers, len(snapshots(city))) == (True, 1, 3)
    done = expire(city, age(city))
    assert (done.snapshots, done.leftovers) == (told.snapshots, 1)
    assert done.bytes > 0
    assert state(city) == (newest, counts, dumps)
    assert len(snapshots(city)) == 1
    assert expire(city, age(city)).bytes == 0
    assert ingest(city, [write(city.root / "4.parquet", 4).name])["rows"] == 5000


def test_expiry_keeps_what_the_map_was_made_of(city):
    first = ingest(city, [write(city.root / "1.parquet", 11).name])["snapshot"]
    ingest(city, [write(city.root / "2.parquet", 12).name])
    expire(city, age(city), keep=first)
    assert CubeReader(cubes_path(city), first).window("count", 0, 0, 64, 64) is not None
    assert first in {s.id for s in snapshots(city)}


def test_expiry_during_an_ingest_is_refused_and_destroys_nothing(city):
    ingest(city)
    before = state(city)
    for name in (INGEST, MAP, COMMITTER):
        with waiting_lock(city.workspace_path, name, "a test"), pytest.raises(StoreError, match="is writing"):
            expire(city, age(city))
    code = (
        f"from pathlib import Path; from roadfuse_core.settings import load_city; from roadfuse_core.cubes import ingest; "
        f"ingest(load_city(Path({str(city.root / 'city.yaml')!r})), ['big.parquet'], tell=lambda *_: print('on', flush=True))"
    )
    write(city.root / "big.parquet", 7, 300_000)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"on\n"
        with pytest.raises(StoreError, match="is writing"):
            expire(city, age(city))
        writer.communicate()
    assert writer.returncode == 0
    assert sum(e["rows"] for e in ledger(city).values()) == 305_000
    expire(city, age(city))
    assert int(np.sum(state(city)[1])) == sum(e["kept"] for e in ledger(city).values())
    assert state(city)[2][:1] == before[2]


def test_two_ingests_at_once_are_one_and_a_refusal(city):
    outcomes = []

    def run():
        try:
            outcomes.append(ingest(city) is not None)
        except StoreError:
            outcomes.append(False)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert outcomes.count(True) == 1
    assert len(ledger(city)) == 1
    assert open_repository(cubes_path(city)).list_branches() == {"main"}
