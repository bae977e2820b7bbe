"""The points engine against datashader and DuckDB on the same Parquet, paired, in one run.

python -m tests.benchmarks.points [--points 2e7] [--runs 5] [--data DIR]. The points are road-like (`roadfuse
simulate`'s vehicles over a city of 16 km, at least 1,000 tiles of 512 px touched), made once and kept in DIR.
"""

import argparse
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import ingest
from roadfuse_core.grid import fit_projection
from roadfuse_core.grid._projection import horner
from roadfuse_core.points import Collector, Part, judge_rows, read_batches
from roadfuse_core.settings import City, ClusterSpec, ColumnSpec, load_city
from roadfuse_core.simulate import CityKnobs
from roadfuse_core.simulate._landscape import Landscape
from roadfuse_core.simulate._write import SimulatedCity, _write_city_file, _write_dump

ROWS_A_DAY = 5_000_000
SLICE_ROWS = 2_500_000


def knobs(points: int) -> CityKnobs:
    days = max(1, round(points / ROWS_A_DAY))
    return CityKnobs(seed=21, size_m=16_384, tile_px=512, days=days, points_per_day=points // days, parking=0)


def empty_landscape() -> Landscape:
    """Vehicles without houses: the benchmark needs no image."""
    none, flat = np.zeros((0, 4, 2)), np.zeros(0)
    return Landscape(none, np.zeros((0, 3)), flat, flat.astype(bool), [], np.zeros((0, 2)), [], [], np.zeros((0, 3)), none,
                     np.zeros((0, 3)), np.zeros(2))  # fmt: skip


def write_days(job: tuple[Path, CityKnobs, list[int]]) -> None:
    folder, k, days = job
    city = SimulatedCity(k)
    city.__dict__["landscape"] = empty_landscape()
    for day in days:
        _write_dump(folder, city, day, lambda *_: None)


def make_data(folder: Path, points: int) -> City:
    k = knobs(points)
    if not (folder / "city.yaml").exists():
        (folder / "dumps").mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool(2) as pool:
            pool.map(write_days, [(folder, k, list(range(start, k.days, 2))) for start in (0, 1)])
        _write_city_file(folder, SimulatedCity(k))
    return load_city(folder / "city.yaml")


def variant(city: City, name: str, workspace: Path) -> City:
    """count: no vehicle rules, count alone; five: all quantities, interval given; rules: all rules on."""
    clean = city.points.clean.model_copy(update={"duplicates": False, "teleport_kmh": None})
    columns = {
        "count": ColumnSpec(lon="lon", lat="lat", time="time"),
        "five": city.points.columns.model_copy(update={"vehicle": None}),
    }
    update = {"columns": columns[name], "clean": clean} if name in columns else {}
    return city.model_copy(update={"workspace": str(workspace), "points": city.points.model_copy(update=update)})


def files(city: City) -> list[str]:
    return sorted(str(p) for p in city.root.glob("dumps/*.parquet"))


@njit(cache=True, nogil=True)
def project_all(x, y, scale, c, degree, col, row):
    """The engine's own compiled projection, so that only the counting is compared."""
    for i in range(len(x)):
        u, v = x[i] * scale[0] + scale[1], y[i] * scale[2] + scale[3]
        col[i], row[i] = horner(u, v, c, 0, degree), horner(u, v, c, 1, degree)


def run_datashader(city: City) -> float:
    """Count into a canvas of the same pixels, in memory only."""
    import dask
    import dask.dataframe as dd
    import datashader

    grid = city.make_grid()
    projection = fit_projection(grid)

    def project(frame):
        col, row = np.empty(len(frame)), np.empty(len(frame))
        x, y = (np.require(frame[k].to_numpy(), requirements="CW") for k in ("lon", "lat"))
        project_all(x, y, projection.scale(), projection.coefficients, projection.degree, col, row)
        return frame.assign(col=col, row=row)[["col", "row"]]

    began = time.perf_counter()
    frame = dd.read_parquet(files(city), columns=["lon", "lat"])
    placed = frame.map_partitions(project, meta={"col": "f8", "row": "f8"})
    canvas = datashader.Canvas(*grid.shape[::-1], x_range=(0, grid.shape[1]), y_range=(0, grid.shape[0]))
    with dask.config.set(scheduler="threads", num_workers=2):
        canvas.points(placed, "col", "row", datashader.count())
    return time.perf_counter() - began


def run_scan(city: City, columns: tuple[str, ...]) -> float:
    """DuckDB sums the projected coordinates and every other column: the scan and the arithmetic, nothing else."""
    p = fit_projection(city.make_grid())
    s = p.scale()
    terms = [(i, j) for i in range(p.degree + 1) for j in range(p.degree + 1 - i)]

    def power(name: str, n: int) -> str:
        return "*".join([name] * n) or "1"

    def poly(axis: int) -> str:
        return "+".join(
            f"({p.coefficients[axis, k]!r})*{power('u', i)}*{power('v', j)}" for k, (i, j) in enumerate(terms)
        ).replace("np.float64", "")

    others = ", ".join(f"{'max' if c == 'time' else 'sum'}({c})" for c in columns)
    query = (f"WITH t AS (SELECT *, lon*({s[0]})+({s[1]}) AS u, lat*({s[2]})+({s[3]}) AS v FROM read_parquet(?) WHERE isfinite(lat))"
             f" SELECT sum({poly(0)}), sum({poly(1)}), {others} FROM t")  # fmt: skip
    with duckdb.connect() as connection:
        connection.execute("SET threads = 2")
        connection.execute("SET enable_progress_bar = false")
        began = time.perf_counter()
        connection.execute(query, [files(city)]).fetchall()
        return time.perf_counter() - began


def fresh(scratch: Path) -> Path:
    """A workspace of its own for every ingest: file systems are slow where thousands of files have just been removed."""
    return Path(tempfile.mkdtemp(dir=scratch))


def run_ingest(city: City, name: str, client, workspace: Path) -> float:
    began = time.perf_counter()
    ingest(variant(city, name, workspace), client=client)
    return time.perf_counter() - began


def peak_mib() -> float:
    """Most memory that this worker ever held; `getrusage` would also count what its parent held before."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run_backfill(city: City, client, workspace: Path) -> tuple[float, float]:
    """Seconds of all files but a hundredth of the points, and of that hundredth afterwards."""
    small = workspace.parent / "hundredth.parquet"
    *most, last = files(city)
    table = pq.read_table(last)
    pq.write_table(table.slice(0, table.num_rows * len(files(city)) // 100), small, compression="zstd")
    c = variant(city, "count", workspace)
    began = time.perf_counter()
    ingest(c, most, client=client)
    middle = time.perf_counter()
    ingest(c, [str(small)], client=client)
    return middle - began, time.perf_counter() - middle


def place_some(city: City, scratch: Path) -> Collector:
    """The kept rows of one slice, as the map collects them."""
    c, grid = variant(city, "five", scratch), city.make_grid()
    spec, projection = c.points.model_copy(update={"sources": ("-",)}), fit_projection(grid)
    collector = Collector(spec, grid, SLICE_ROWS)
    for rows in read_batches(spec, Part((files(city)[0],), rows=(0, SLICE_ROWS)), False, scratch / "spill"):
        collector.add(rows, judge_rows(rows, spec.clean, grid, projection), rows.interval)
    return collector


def run_loops(city: City) -> None:
    """What it takes to bring the rows of one slice together: added up by DuckDB, by a sort in NumPy, or not added up."""
    with tempfile.TemporaryDirectory() as scratch, duckdb.connect() as connection:
        collector = place_some(city, Path(scratch))
        n, px = collector.held, city.grid.tile_px
        columns = {k: v[:n].copy() for k, v in collector.columns.items()}
        key = collector.tile[:n].astype(np.int64) * px**2 + columns.pop("pixel")
        began = time.perf_counter()
        samples = collector.samples()
        ours = time.perf_counter() - began
        connection.execute("SET threads = 1")
        connection.register("rows", pa.table({"key": key} | columns))
        began = time.perf_counter()
        sums = ", ".join(f"sum({k})" for k in columns)
        left = connection.sql(f"SELECT key, count(*), {sums} FROM rows GROUP BY key ORDER BY key").to_arrow_table().num_rows
        by_duckdb = time.perf_counter() - began
    began = time.perf_counter()
    order = np.argsort(key)
    starts = np.flatnonzero(np.r_[True, np.diff(key[order]) > 0])
    _ = [np.add.reduceat(v[order].astype(np.int64), starts) for v in columns.values()]
    by_sort = time.perf_counter() - began
    assert left == len(starts)
    print(f"inner loops, one slice of {n:,} kept rows in {len(samples.runs):,} runs, on {left:,} pixels")
    print(f"  GROUP BY in DuckDB / two counting sorts      {by_duckdb / ours:.1f}")
    print(f"  sort and sums in NumPy / two counting sorts  {by_sort / ours:.1f}")


def main(points: int = 20_000_000, runs: int = 5, data: Path | None = None, only: str = "") -> None:
    """Print a table of medians and of medians of paired ratios."""
    with tempfile.TemporaryDirectory() as made:
        city = make_data(data or Path(made), points)
        measure(city, sum(pq.ParquetFile(f).metadata.num_rows for f in files(city)), runs, only)  # DIR may hold others


def measure(city: City, points: int, runs: int, only: str) -> None:
    """The runs; the memory is that of workers which did nothing but a count-only ingest and a backfill."""
    if not only or "loops" in only.split(","):
        run_loops(city)
    if only == "loops":
        return
    with tempfile.TemporaryDirectory() as scratch, open_cluster(ClusterSpec(workers=2)) as client:
        taken: dict[str, list[float]] = {}
        steps = {"scan 3": lambda: run_scan(city, ("time",)),
                 "scan 6": lambda: run_scan(city, ("time", "speed", "bearing", "interval")),
                 "datashader": lambda: run_datashader(city)}  # fmt: skip
        steps |= {n: lambda n=n: run_ingest(city, n, client, fresh(Path(scratch))) for n in ("count", "five", "rules")}
        for run in range(runs + 1):
            for name, step in steps.items():
                if only and name not in only.split(","):
                    continue
                seconds = step()
                if run or not runs:  # the first round warms caches and compilers
                    taken.setdefault(name, []).append(seconds)
        workspace = fresh(Path(scratch))
        run_ingest(city, "count", client, workspace)
        cube = sum(p.stat().st_size for p in (workspace / "cubes/chunks").rglob("*") if p.is_file())
        parquet = sum(Path(f).stat().st_size for f in files(city))
    with tempfile.TemporaryDirectory() as scratch, open_cluster(ClusterSpec(workers=2)) as client:
        rest, hundredth = run_backfill(city, client, Path(scratch) / "work")
        peak = max(client.run(peak_mib).values())
    show(points, runs, taken, cube / parquet)
    print(f"  backfill of 1 % of the points    {hundredth:.1f} s after {rest:.1f} s   (target ≤ 3 % + 10 s)")
    print(f"  peak memory of a worker          {peak:,.0f} MiB   (target ≤ 2,048; within 15 % from 1e7 to 1e9 points)")


def show(points: int, runs: int, taken: dict[str, list[float]], disk: float) -> None:
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(taken[a], taken[b], strict=True))

    print(
        f"points, {points:,} road-like rows, 2 workers, medians of {max(1, runs)} paired runs after {min(1, runs)} to warm up"
    )
    for name, seconds in taken.items():
        print(f"  {name:<11} {statistics.median(seconds):7.2f} s  {points / statistics.median(seconds) / 1e6:7.2f} M rows/s")
    for what, a, b, target in (
        ("datashader / count-only cube", "datashader", "count", "target ≥ 2, then 3"),
        ("count-only cube / scan of its 3 columns", "count", "scan 3", "target ≤ 3"),
        ("five quantities / scan of their 6 columns", "five", "scan 6", "target ≤ 5"),
        ("five quantities / scan of 3 columns", "five", "scan 3", "stated"),
        ("vehicle rules / five quantities", "rules", "five", "stated"),
    ):
        if a in taken and b in taken:
            print(f"  {what:<42} {ratio(a, b):.2f}   ({target})")
    print(f"  count-only cube / Parquet, bytes           {disk:.2f}   (target ≤ 0.25 at 10,000 points a tile and period)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=float, default=2e7)
    parser.add_argument("--runs", type=int, default=5, help="after one to warm up; 0 for one that is cold")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="", help="loops,scan 3,scan 6,datashader,count,five,rules")
    arguments = parser.parse_args()
    main(int(arguments.points), arguments.runs, arguments.data, arguments.only)
