"""A dump is in the cube wholly or not at all, whatever happens."""

import json
import os
import shutil
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyproj import Transformer

from roadfuse_core.cubes import (
    CubeReader,
    changed_tiles,
    committer_lock,
    cubes_path,
    files_between,
    forecast,
    ingest,
    ledger,
    open_repository,
    plan_ingest,
    read_group,
    snapshots,
)
from roadfuse_core.cubes._reduce import owned_blocks
from roadfuse_core.errors import ConfigError, DataError, StoreError
from roadfuse_core.grid import Grid
from roadfuse_core.points import read_report
from roadfuse_core.settings import City, load_city
from roadfuse_core.simulate import CityKnobs, DirtKnobs, simulate_city
from tests.stopping import Stopped
from tests.unit.test_points import totals


def contents(city: City) -> dict[str, np.ndarray]:
    """Every array of the cube, whole."""
    root = read_group(open_repository(cubes_path(city)))
    out = {}
    for folder in ("period", "total"):
        for name in root.attrs["arrays"]:
            out[f"{folder}/{name}"] = _trimmed(root[f"{folder}/{name}"])
    return out


def _trimmed(array) -> dict:
    """Non-zero places and values; the period axis is long and mostly empty."""
    if array.ndim == 2:
        data = array[:]
        return {p: int(data[p]) for p in zip(*(a.tolist() for a in np.nonzero(data)))}
    first = 12 * 56
    data = array[first:]
    return {(int(p) + first, int(y), int(x)): int(data[p, y, x]) for p, y, x in zip(*np.nonzero(data))}


def fresh(city: City, name: str) -> City:
    return city.model_copy(update={"workspace": name})


def test_rows_are_conserved_and_the_sum_of_count_is_what_was_kept(small_city):
    entry = ingest(small_city)
    assert entry["rows"] == entry["kept"] + sum(entry["rejected"].values())
    assert entry["rows"] == sum(pq.read_metadata(f["path"]).num_rows for f in entry["files"])
    assert CubeReader(cubes_path(small_city)).window("count", 0, 0, 512, 512).sum() == entry["kept"]
    held = ledger(small_city)[entry["dump"]]
    assert held == {k: v for k, v in entry.items() if k != "snapshot"}


def test_the_cube_holds_what_a_plain_loop_adds_up_from_the_samples(small_city):
    entry = ingest(small_city)
    folder, grid = small_city.workspace_path / "shards" / entry["shards"], small_city.make_grid()
    expected = {}
    for (tile, period, pixel), sums in totals([read_report(p) for p in sorted(folder.glob("shard-*.json"))]).items():
        y, x = (t * grid.tile_px + p for t, p in zip(divmod(tile, grid.tiles_x), divmod(pixel, grid.tile_px), strict=True))
        for name, value in sums.items():
            for path, place in ((f"period/{name}", (period, y, x)), (f"total/{name}", (y, x))):
                held = expected.setdefault(path, {})
                held[place] = held.get(place, 0) + value
    assert contents(small_city) == {path: {k: v for k, v in held.items() if v} for path, held in expected.items()}


def test_injected_dirt_is_what_is_rejected(tmp_path):
    dirt = DirtKnobs(swapped=0.02, duplicate=0.02, teleport=0.02)
    knobs = CityKnobs(seed=5, size_m=512, tile_px=128, days=1, points_per_day=6000, intervals_s=(2.0,), parking=0, dirt=dirt)
    city = load_city(simulate_city(tmp_path, knobs))
    injected = json.loads((tmp_path / "simulation.json").read_text())["dirt"]
    entry = ingest(city)
    assert entry["rejected"]["null_island"] == injected["null_island"]
    assert entry["rejected"]["not_finite"] == injected["not_finite"]
    # Vehicles leave the city's square: of what happens there only `outside` is seen.
    inside = 1 - entry["rejected"]["outside"] / entry["rows"]
    for name in ("swapped", "duplicate", "teleport"):
        assert 0.8 * inside * injected[name] <= entry["rejected"][name] <= injected[name] + 5


def test_ingesting_twice_changes_nothing(small_city):
    first = ingest(small_city)
    before = contents(small_city)
    assert ingest(small_city) is None
    assert contents(small_city) == before
    assert list(ledger(small_city)) == [first["dump"]]
    renamed = small_city.root / "renamed.parquet"
    shutil.copy(first["files"][0]["path"], renamed)
    assert ingest(small_city, ["renamed.parquet"]) is None


@pytest.fixture
def still_city(small_city) -> City:
    """Vehicle rules off: every row is judged alone."""
    clean = small_city.points.clean.model_copy(update={"duplicates": False, "teleport_kmh": None})
    return small_city.model_copy(update={"points": small_city.points.model_copy(update={"clean": clean})})


def test_any_split_into_dumps_and_any_order_gives_the_same_cube(still_city):
    ingest(fresh(still_city, "once"))
    for name, order in (("forth", 1), ("back", -1)):
        for source in sorted(still_city.root.glob("dumps/*.parquet"))[::order]:
            assert ingest(fresh(still_city, name), [f"dumps/{source.name}"])
    whole = contents(fresh(still_city, "once"))
    assert contents(fresh(still_city, "forth")) == whole
    assert contents(fresh(still_city, "back")) == whole
    assert len(ledger(fresh(still_city, "back"))) == 3


def test_total_is_the_sum_of_the_periods(small_city):
    ingest(small_city)
    held = contents(small_city)
    for name in ("count", "speed_sum", "cos_sum", "interval_sum"):
        total: dict = {}
        for (_, y, x), value in held[f"period/{name}"].items():
            total[y, x] = total.get((y, x), 0) + value
        assert {k: v for k, v in total.items() if v} == held[f"total/{name}"]
    assert {p for p, _, _ in held["period/count"]} == {674}


def test_an_independent_count_agrees_pixel_by_pixel(still_city):
    ingest(still_city)
    grid = still_city.make_grid()
    table = pa.concat_tables([pq.read_table(p) for p in sorted(still_city.root.glob("dumps/*.parquet"))])
    lon, lat, speed = (table[c].to_numpy() for c in ("lon", "lat", "speed"))
    ok = np.isfinite(lon) & np.isfinite(lat) & ~((lon == 0) & (lat == 0)) & ~(speed > 250)
    east, north = Transformer.from_crs("EPSG:4326", grid.crs, always_xy=True).transform(lon[ok], lat[ok])
    col, row = (east - grid.bounds.left) / grid.resolution_m, (grid.bounds.top - north) / grid.resolution_m
    inside = (col >= 0) & (row >= 0) & (col < grid.shape[1]) & (row < grid.shape[0])
    col, row = col[inside], row[inside]
    expected = np.zeros(grid.shape, np.int64)
    np.add.at(expected, (row.astype(int), col.astype(int)), 1)
    got = CubeReader(cubes_path(still_city)).window("count", 0, 0, *grid.shape)
    near_edge = (np.abs(col - np.rint(col)) < 0.01) | (np.abs(row - np.rint(row)) < 0.01)
    touched = np.zeros(grid.shape, bool)
    for r, c in zip(row[near_edge], col[near_edge]):
        touched[max(0, int(r - 0.5)) : int(r + 0.5) + 1, max(0, int(c - 0.5)) : int(c + 0.5) + 1] = True
    assert (got != expected)[~touched].sum() == 0
    assert abs(int(got.sum()) - int(expected.sum())) <= near_edge.sum()
    assert (~touched & (expected > 0)).sum() > 1000


def test_windows_past_the_rim_are_zero(small_city):
    ingest(small_city)
    cube = CubeReader(cubes_path(small_city))
    wide = cube.window("count", -10, -20, 540, 560)
    assert np.array_equal(wide[10:522, 20:532], cube.window("count", 0, 0, 512, 512))
    assert wide.sum() == cube.window("count", 0, 0, 512, 512).sum()


def test_a_changed_file_is_refused(small_city):
    table = pq.read_table(small_city.root / "dumps/2026-03-29.parquet")
    pq.write_table(table, small_city.root / "extra.parquet")
    ingest(small_city, ["extra.parquet"])
    pq.write_table(table.slice(5), small_city.root / "extra.parquet")
    with pytest.raises(DataError, match=r"extra\.parquet was ingested with other content"):
        ingest(small_city, ["extra.parquet"])


def test_another_grid_or_period_is_refused(small_city):
    ingest(small_city, ["dumps/2026-03-29.parquet"])
    before = contents(small_city)
    other = small_city.model_copy(update={"points": small_city.points.model_copy(update={"period": "day"})})
    with pytest.raises(ConfigError, match=r"points\.period: 'day' differs"):
        ingest(other, ["dumps/2026-03-30.parquet"])
    assert contents(small_city) == before


def test_exchanged_coordinates_stop_the_dump(small_city):
    columns = small_city.points.columns.model_copy(update={"lon": "lat", "lat": "lon"})
    wrong = small_city.model_copy(update={"points": small_city.points.model_copy(update={"columns": columns})})
    with pytest.raises(ConfigError, match="only when exchanged"):
        ingest(wrong)
    assert ledger(small_city) == {}


def test_a_truncated_file_leaves_the_cube_as_it_was(small_city):
    ingest(small_city, ["dumps/2026-03-29.parquet"])
    before = contents(small_city)
    whole = (small_city.root / "dumps/2026-03-30.parquet").read_bytes()
    (small_city.root / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet is not readable Parquet"):
        ingest(small_city, ["cut.parquet"])
    # The footer is whole and the pages are not: found only while reading.
    (small_city.root / "worn.parquet").write_bytes(whole[:4] + b"\0" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(DataError, match="cannot read"):
        ingest(small_city, ["worn.parquet"])
    assert contents(small_city) == before


# Small parts and blocks, so that there is a middle to stop in.
SMALL_JOBS = "from roadfuse_core.cubes import _plan, _reduce; _plan.ROWS_PER_SLICE = 2500; _reduce.BLOCK_TILES = 4"


@pytest.mark.parametrize(
    ("what", "least", "shards"),
    [("shuffling vehicles", 1, 0), ("reading points", 1, 1), ("writing blocks", 1, 4)],
)
def test_killed_and_run_again_equals_undisturbed(small_city, undisturbed, what, least, shards):
    running = Stopped(what, least, ["ingest", small_city.root / "city.yaml"], SMALL_JOBS)
    assert len(list((small_city.workspace_path / "shards").glob("*/shard-*.json"))) >= shards, "the work was under way"
    running.kill()
    assert ledger(small_city) == {}, "nothing was published"
    ingest(small_city)
    assert contents(small_city) == undisturbed
    assert len(ledger(small_city)) == 1
    kept = {p.name for p in (small_city.workspace_path / "shards").iterdir()}
    assert kept == {e["shards"] for e in ledger(small_city).values()}


@pytest.fixture(scope="session")
def undisturbed(simulated, tmp_path_factory):
    """The small city's cube."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "city.yaml").write_text((simulated / "city.yaml").read_text())
    (folder / "dumps").symlink_to(simulated / "dumps")
    city = load_city(folder / "city.yaml")
    ingest(city)
    return contents(city)


def test_the_plan_says_what_is_new(small_city):
    plan = plan_ingest(small_city)
    assert (len(plan.files), len(plan.known)) == (3, 0)
    assert not cubes_path(small_city).exists()
    ingest(small_city, ["dumps/2026-03-29.parquet"])
    plan = plan_ingest(small_city)
    assert (len(plan.files), len(plan.known)) == (2, 1)


def test_readers_open_it_with_xarray(small_city):
    import xarray

    entry = ingest(small_city)
    session = open_repository(cubes_path(small_city)).readonly_session("main")
    data = xarray.open_zarr(session.store, group="total", consolidated=False)
    assert int(data["count"].sum()) == entry["kept"]
    grid = small_city.make_grid()
    assert float(data.x[0]) == grid.bounds.left + grid.resolution_m / 2
    assert float(data.y[0]) == grid.bounds.top - grid.resolution_m / 2


def test_chunks_are_those_of_zarr(tmp_path):
    import zarr

    from roadfuse_core.cubes._chunks import Chunks
    from roadfuse_core.cubes._repository import create_arrays

    grid = Grid("EPSG:32633", 1.0, 64, 0, 2, 2, 3)
    session = open_repository(tmp_path / "r", create=True).writable_session("main")
    root = zarr.open_group(session.store)
    create_arrays(root, grid, ("count", "speed_sum"), "month")
    root["period/count"].resize((2, *grid.shape))
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 2**32, (64, 64)), rng.integers(-(2**40), 2**40, (64, 64))
    chunks = Chunks(session.store, root)
    chunks.write("period/count", (1, 1, 2), ours)
    chunks.flush()
    assert np.array_equal(root["period/count"][1, 64:, 128:], ours)
    root["total/speed_sum"][64:, :64] = theirs
    assert np.array_equal(chunks.read("total/speed_sum", (1, 0)).reshape(64, 64), theirs)
    assert chunks.read("total/speed_sum", (0, 0)) is None
    both = chunks.read_all([("total/speed_sum", (0, 0)), ("period/count", (1, 1, 2))])
    assert both[0] is None
    assert np.array_equal(both[1].reshape(64, 64), ours)


def test_the_lock_is_free_although_a_child_that_was_forked_meanwhile_lives(tmp_path):
    with committer_lock(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with committer_lock(tmp_path):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_every_touched_tile_has_one_owner():
    tiles = np.random.default_rng(0).permutation(5000)[:700].tolist()
    owners = owned_blocks(tiles)
    assert [t for o in owners for t in o] == sorted(tiles)
    assert max(map(len, owners)) == 32
    with pytest.raises(ValueError, match="one owner"):
        owned_blocks([3, 4, 3])


def test_any_size_of_slices_gives_the_same_cube(small_city, monkeypatch):
    """One slice; small files together; files in pieces and vehicles shuffled."""
    from roadfuse_core.cubes import _plan

    ingest(fresh(small_city, "whole"))
    expected, entry = contents(fresh(small_city, "whole")), next(iter(ledger(fresh(small_city, "whole")).values()))
    for rows in (4000, 900):
        monkeypatch.setattr(_plan, "ROWS_PER_SLICE", rows)
        got = ingest(fresh(small_city, f"by-{rows}"))
        assert contents(fresh(small_city, f"by-{rows}")) == expected
        assert got["rejected"] == entry["rejected"]


def test_a_crowded_tile_is_added_in_pieces(small_city, monkeypatch):
    from roadfuse_core.cubes import _plan, _reduce

    ingest(fresh(small_city, "whole"))
    monkeypatch.setattr(_plan, "ROWS_PER_SLICE", 900)
    monkeypatch.setattr(_reduce, "TILE_ROWS", 50)
    ingest(fresh(small_city, "pieces"))
    assert contents(fresh(small_city, "pieces")) == contents(fresh(small_city, "whole"))


def test_replacing_a_dump_is_as_if_it_had_never_been_in(small_city):
    first = ingest(small_city, ["dumps/2026-03-29.parquet"])
    ingest(small_city, ["dumps/2026-03-30.parquet"])
    replaced = ingest(small_city, ["dumps/2026-03-31.parquet"], replace=first["dump"])
    other = fresh(small_city, "scratch")
    ingest(other, ["dumps/2026-03-30.parquet"])
    ingest(other, ["dumps/2026-03-31.parquet"])
    assert contents(small_city) == contents(other)
    assert _chunk_names(small_city) == _chunk_names(other)
    assert list(ledger(small_city)) == list(ledger(other)) == [next(iter(ledger(other))), replaced["dump"]]
    back = ingest(small_city, ["dumps/2026-03-29.parquet"])
    assert back["kept"] == first["kept"]


def _chunk_names(city):
    import asyncio

    session = open_repository(cubes_path(city)).readonly_session("main")

    async def names(path):
        return [tuple(c) async for c in session.chunk_coordinates(path)]

    return {p: sorted(asyncio.run(names(p))) for p in ("/total/count", "/period/count", "/total/cos_sum")}


def test_replacing_wants_a_dump_whose_contributions_are_kept(small_city):
    entry = ingest(small_city, ["dumps/2026-03-29.parquet"])
    before = contents(small_city)
    with pytest.raises(ConfigError, match="--replace: 'x' is not in the ledger"):
        ingest(small_city, ["dumps/2026-03-30.parquet"], replace="x")
    with pytest.raises(ConfigError, match="--replace: 'x' is not in the ledger"):
        plan_ingest(small_city, ["dumps/2026-03-29.parquet"], "x")  # no new file, and a command that stops here
    for shard in small_city.workspace_path.glob("shards/*/*.samples"):
        pq.write_table(pa.table({"tile": [1]}), shard)
    with pytest.raises(StoreError, match="are damaged, and it cannot leave"):
        ingest(small_city, ["dumps/2026-03-30.parquet"], replace=entry["dump"])
    shutil.rmtree(small_city.workspace_path / "shards")
    with pytest.raises(StoreError, match="no longer kept"):
        ingest(small_city, ["dumps/2026-03-30.parquet"], replace=entry["dump"])
    assert contents(small_city) == before


def test_the_diff_of_two_snapshots_names_the_changed_tiles(small_city):
    first = ingest(small_city, ["dumps/2026-03-29.parquet"])
    table = pq.read_table(small_city.root / "dumps/2026-03-30.parquet")
    grid = small_city.make_grid()
    to_grid = Transformer.from_crs(4326, grid.crs, always_xy=True)
    east, _ = to_grid.transform(table["lon"].to_numpy(), table["lat"].to_numpy())
    west_half = np.flatnonzero(np.nan_to_num(east, posinf=1e9) < grid.bounds.left + 128)
    pq.write_table(table.take(west_half), small_city.root / "west.parquet")
    ingest(small_city, ["west.parquet"])
    changed = changed_tiles(small_city, first["snapshot"])
    assert changed
    assert {t.col for t in changed} == {0}
    with pytest.raises(StoreError, match="no longer held"):
        changed_tiles(small_city, "AAAAAAAAAAAAAAAAAAA0")


def test_rejected_rows_go_to_quarantine_with_their_reasons(small_city, tmp_path):
    entry = ingest(small_city, quarantine=tmp_path / "bad")
    table = pa.concat_tables([pq.read_table(p) for p in (tmp_path / "bad").rglob("*.parquet")])
    reasons = table["reason"].to_pylist()
    assert {r: reasons.count(r) for r in set(reasons)} == entry["rejected"]


def test_a_folder_stands_for_its_files(small_city):
    hive = small_city.root / "hive/day=1"
    hive.mkdir(parents=True)
    shutil.copy(small_city.root / "dumps/2026-03-29.parquet", hive / "part-0.parquet")
    (hive / "_SUCCESS").write_text("")
    assert ingest(small_city, ["hive"])["rows"] == 3009


def test_files_of_a_time_range(small_city):
    plan = plan_ingest(small_city)
    chosen = files_between(small_city, plan, datetime(2026, 3, 30), datetime(2026, 3, 31))
    assert [Path(c.path).name for c in chosen] == ["2026-03-30.parquet"]
    everything = files_between(small_city, plan, datetime(2026, 3, 1), datetime(2026, 5, 1, tzinfo=UTC))
    assert len(everything) == 3
    with pytest.raises(ConfigError, match="is not after"):
        files_between(small_city, plan, datetime(2026, 3, 31), datetime(2026, 3, 31))
    assert ingest(small_city, chosen)["rows"] == 3009


@pytest.mark.parametrize("chosen", [(), ("speed",), ("bearing",), ("speed", "bearing", "interval")])
def test_a_cube_holds_any_subset_of_the_quantities(small_city, chosen):
    """Each array is the same, whichever others are beside it."""
    still = small_city.points.clean.model_copy(update={"duplicates": False, "teleport_kmh": None})
    every = small_city.points.model_copy(update={"clean": still})
    dropped = dict.fromkeys({"speed", "bearing", "interval", "vehicle"} - set(chosen))
    some = every.model_copy(update={"columns": every.columns.model_copy(update=dropped)})
    full, part = fresh(small_city, "full"), fresh(small_city, "part")
    ingest(
        full.model_copy(
            update={"points": every.model_copy(update={"columns": every.columns.model_copy(update={"vehicle": None})})}
        )
    )
    ingest(part.model_copy(update={"points": some}))
    held, whole = contents(part), contents(full)
    assert len(held) == 2 * (1 + 2 * ("speed" in chosen) + 3 * ("bearing" in chosen) + 2 * ("interval" in chosen))
    assert all(held[name] == whole[name] for name in held)


def test_the_forecast_is_what_comes(small_city):
    told = forecast(small_city, plan_ingest(small_city))
    assert not cubes_path(small_city).exists()
    entry = ingest(small_city)
    assert told.sampled == entry["rows"]  # small files are seen whole
    assert told.tiles == entry["tiles"]
    assert told.periods == 1
    arrays = len(read_group(open_repository(cubes_path(small_city))).attrs["arrays"])
    assert told.chunks == told.tiles * 2 * arrays
    assert told.points_per_chunk == pytest.approx(entry["kept"] / told.tiles, rel=0.05)  # repetitions are not foreseen
    assert [s.id for s in snapshots(small_city)] == [entry["snapshot"]]
