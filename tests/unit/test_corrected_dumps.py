"""A dump that was read with wrong settings can be read again, and what does nothing says so."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.cubes import CubeReader, cubes_path, ingest, ledger, open_repository
from roadfuse_core.cubes import _plan as planning
from roadfuse_core.errors import ConfigError
from roadfuse_core.settings import load_city
from tests.unit.test_cubes import contents
from tests.unit.test_ledger import run


@pytest.fixture
def fleet(tmp_path):
    """1,003 rows at 9 m/s, which the city file takes for km/h."""
    rng, n = np.random.default_rng(4), 1003
    table = pa.table({"lon": 13 + 0.01 * rng.random(n), "lat": 47 + 0.01 * rng.random(n), "v": np.full(n, 9.0),
                      "t": pa.array(1_770_000_000 + np.arange(n) * 60)})  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 303), tmp_path / "b.parquet")
    return city_file(tmp_path)


def city_file(folder, name="city.yaml", grid=None, **points):
    spec = {
        "name": "c", "workspace": "work",
        "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64} | (grid or {}),
        "points": {"sources": ["a.parquet"], "columns": {"lon": "lon", "lat": "lat", "time": "t", "speed": "v"}} | points,
        "cluster": {"kind": "local", "workers": 1, "memory_gib": 2},
    }  # fmt: skip
    (folder / name).write_text(yaml.safe_dump(spec))
    return folder / name


def speeds(city):
    return int(CubeReader(cubes_path(city)).window("speed_sum", 0, 0, *city.make_grid().shape).sum())


def test_the_same_files_are_read_again_under_corrected_settings(fleet):
    city = load_city(fleet)
    wrong = ingest(city)["dump"]
    assert speeds(city) == 1003 * 2500
    fixed = city_file(city.root, "fixed.yaml", speed_unit="m/s")
    line = f"dump {wrong} was read with other settings (points.speed_unit was 'km/h' and is 'm/s')"
    for command in ("status", "check", "ingest"):
        code, told = run(command, fixed)
        assert code == 0
        assert line in " ".join(told.split()), command
    assert speeds(city) == 1003 * 2500
    code, told = run("ingest", fixed, "--replace", wrong)
    assert (code, "other settings" in told) == (0, False)
    assert speeds(city) == 1003 * 9000
    (right,) = ledger(city)
    assert right != wrong
    undisturbed = load_city(fixed).model_copy(update={"workspace": "undisturbed"})
    ingest(undisturbed)
    assert contents(city) == contents(undisturbed)


def test_a_replacement_that_does_nothing_says_so(fleet):
    city = load_city(fleet)
    dump = ingest(city)["dump"]
    before = open_repository(cubes_path(city)).lookup_branch("main")
    code, told = run("ingest", fleet, "--replace", dump)
    assert code == 0
    assert f"dump {dump} stays as it is: it was made of these files with these settings" in " ".join(told.split())
    ingest(city, ["b.parquet"])
    code, told = run("ingest", fleet, "b.parquet", "--replace", dump)
    assert f"dump {dump} stays as it is: there is no new file to take its place" in " ".join(told.split())
    assert len(ledger(city)) == 2
    assert before in {s.id for s in open_repository(cubes_path(city)).ancestry(branch="main")}


def test_a_dump_of_an_earlier_version_is_known_by_its_files_and_can_be_read_again(fleet, monkeypatch):
    """Its name came from the files alone, and its settings were not written down."""
    city = load_city(fleet)
    with monkeypatch.context() as earlier:
        earlier.setattr(planning, "_dump_name", lambda *_: "0123456789ab")
        ingest(city)
    forget_settings(city)
    assert ingest(city) is None
    assert run("status", fleet)[0] == 0
    fixed = load_city(city_file(city.root, "fixed.yaml", speed_unit="m/s"))
    assert ingest(fixed) is None
    assert ingest(fixed, replace="0123456789ab")["rows"] == 1003
    assert (len(ledger(city)), speeds(city)) == (1, 1003 * 9000)


def forget_settings(city):
    import zarr

    session = open_repository(cubes_path(city)).writable_session("main")
    attributes = zarr.open_group(session.store, mode="r+")["ledger"].attrs
    attributes["dumps"] = {n: {k: v for k, v in e.items() if k != "settings"} for n, e in attributes["dumps"].items()}
    session.commit("as before")


@pytest.mark.parametrize(("wrong", "suspect"), [
    ({"clean": {"time_range": ["2031-01-01T00:00:00", "2032-01-01T00:00:00"]}}, "points.clean.time_range"),
    ({"columns": {"lon": "v", "lat": "lat", "time": "t", "speed": "v"}}, "points.columns"),
    ({"clean": {"max_speed_kmh": 1}}, "points.clean.max_speed_kmh"),
])  # fmt: skip
def test_a_dump_of_which_nothing_is_kept_is_refused_and_stays_new(fleet, wrong, suspect):
    city = load_city(fleet)
    code, told = run("ingest", city_file(city.root, "wrong.yaml", **wrong))
    assert code == 2
    assert "none of 1,003 rows is kept; nothing was stored" in told
    assert suspect in told
    assert ledger(city) == {}
    assert run("ingest", fleet)[0] == 0
    assert ledger(city).popitem()[1]["kept"] == 1003


def test_a_dump_without_rows_is_no_mistake(fleet):
    city = load_city(fleet)
    pq.write_table(pq.read_table(city.root / "a.parquet").slice(0, 0), city.root / "empty.parquet")
    ingest(city)
    assert ingest(city, ["empty.parquet"])["rows"] == 0
    assert ingest(city, ["empty.parquet"]) is None


def test_files_of_a_dump_of_which_an_earlier_version_kept_nothing_are_new(fleet, monkeypatch):
    from roadfuse_core.cubes import _ingest as ingesting

    city = load_city(fleet)
    wrong = load_city(city_file(city.root, "wrong.yaml", clean={"max_speed_kmh": 1}))
    with monkeypatch.context() as earlier:
        earlier.setattr(ingesting, "_refuse_spoilt", lambda *_: None)
        empty = ingest(wrong)
    assert empty["kept"] == 0
    forget_settings(city)
    with pytest.raises(ConfigError, match="none of 1,003 rows is kept"):
        ingest(wrong)
    entry = ingest(city)
    assert entry["kept"] == 1003
    assert list(ledger(city)) == [entry["dump"]]


def test_copies_within_one_dump_count_once(fleet):
    city = load_city(fleet)
    for name in ("a (1).parquet", "z.parquet"):
        shutil.copy(city.root / "a.parquet", city.root / name)
    both = city_file(city.root, "both.yaml", sources=["*.parquet"])
    code, told = run("ingest", both, "--dry-run")
    assert code == 0
    assert "2 files are copies of others and are not read again" in " ".join(told.split())
    entry = ingest(load_city(both))
    assert (entry["rows"], len(entry["files"])) == (1306, 2)
    assert ingest(load_city(both)) is None


def test_check_and_a_dry_run_say_that_the_cube_has_another_grid(fleet):
    city = load_city(fleet)
    ingest(city)
    later = city_file(city.root, "later.yaml", grid={"resolution_m": 0.5}, sources=["b.parquet"])
    for words in (("check", later), ("ingest", later, "--dry-run"), ("ingest", later)):
        code, told = run(*words)
        assert code == 2, words
        assert "grid: " in told
        assert "differs from the existing cube's" in told
