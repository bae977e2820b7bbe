"""The inference engine against the bare forward pass of the same network, precision, batch and device.

python -m tests.benchmarks.inference [--runs N] [--size M] [--only compact,full,bf16,change,memory,workers,orchestration,profile]

`profile` is not among the defaults: it shows what the networks of `full` spend their time on, by operation.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import torch
import yaml
from dask.distributed import Client
from pyproj import Transformer

from roadfuse_core.cluster import ALLOCATOR, open_cluster
from roadfuse_core.cubes import ingest
from roadfuse_core.files import write_whole
from roadfuse_core.grid import Lattice
from roadfuse_core.inference import MapReader, export_array, infer, load_predictor, plan_refresh
from roadfuse_core.metrics import score_city, tune_kde
from roadfuse_core.models import CheckpointInfo, build_network, load_checkpoint, preset, save_checkpoint
from roadfuse_core.report import map_preview, write_report
from roadfuse_core.settings import City, ClusterSpec, load_city
from roadfuse_core.simulate import CityKnobs, simulate_city
from tests.benchmarks.points import peak_mib

PARTS = ("compact", "full", "bf16", "change", "memory", "workers", "orchestration")
FULL = ("cmmpnet-d-linknet34", "roadfuse")
FULL_M = 4096.0 if torch.cuda.is_available() else 768.0  # edge of the city for networks of full size


def make_city(folder: Path, size_m: float, seed: int = 8, **knobs) -> City:
    """A simulated city, ingested."""
    made = CityKnobs(seed=seed, size_m=size_m, days=2, points_per_day=int(size_m**2 / 60), **knobs)
    city = load_city(simulate_city(folder, made, 2))
    ingest(city)
    return city


def bare(city: City, windows: int, folded: bool = True) -> float:
    """Seconds of the forward passes alone, on inputs at hand; with norms as they were trained, or in their convolutions."""
    plan = plan_refresh(city)
    predictor = load_predictor(plan.model, city.grid.resolution_m)
    if not folded:
        predictor.network = load_checkpoint(plan.model.path)[0].to(predictor.device, memory_format=torch.channels_last)
    n, size = plan.calibration.batch, predictor.window_px
    rng = np.random.default_rng(0)
    inputs = predictor.prepare({
        "image": np.full((n, size, size, 4), 255, np.uint8),
        "gps": rng.random((n, size, size, len(predictor.layers)), dtype=np.float32),
    })  # fmt: skip
    predictor.predict(inputs)
    began = time.perf_counter()
    for _ in range(-(-windows // n)):
        predictor.predict(inputs)
    return time.perf_counter() - began


def ratio(city: City, runs: int) -> tuple[float, float, float]:
    """Medians of paired runs: windows a second of the engine and of the bare forward pass, and their ratio."""
    plan_refresh(city)
    infer(city, group="warm", full=True)
    pairs = []
    for run in range(runs):
        began = time.perf_counter()
        windows = infer(city, group=f"run-{run}", full=True)["windows"]
        whole = windows / (time.perf_counter() - began)
        pairs.append((whole, windows / bare(city, windows)))
    whole, alone = (statistics.median(v) for v in zip(*pairs, strict=True))
    return whole, alone, statistics.median(a / b for a, b in pairs)


def with_model(city: City, **changes) -> City:
    """The city under other settings of its model."""
    return city.model_copy(update={"model": city.model.model_copy(update=changes)})


def full_size(folder: Path, name: str = "cmmpnet-d-linknet34") -> Path:
    """A network at its published width, freshly initialised; the compact network's layers."""
    _, info = load_checkpoint(Path(__file__).parents[2] / "roadfuse_core/weights/fused.safetensors")
    config = preset(name).model_copy(update={"modalities": {"image": 3, "gps": 2}})
    path = folder / f"{name}.safetensors"
    save_checkpoint(path, build_network(config), CheckpointInfo(**(info.model_dump() | {"network": config.model_dump()})))
    return path


def show_ratios(city: City, folder: Path, runs: int, only: list[str]) -> None:
    """Windows a second of the engine, and of the bare forward pass."""
    if "compact" in only:
        for precision in ("32", "bf16"):
            a, b, r = ratio(with_model(city, precision=precision), runs)
            print(f"compact, {precision:<5} {a:7.1f} windows/s of {b:7.1f} bare: {r:.2f} (target 0.85)")
    if "full" in only:
        small, gpu = make_city(folder / "small", FULL_M), torch.cuda.is_available()
        for name in FULL:
            a, b, r = ratio(with_model(small, weights=str(full_size(folder, name)), precision="bf16"), max(1, runs // 3))
            print(f"{name} at full size, bf16 {a:6.2f} windows/s of {b:6.2f} bare: {r:.2f} (target {0.9 if gpu else 0.95})")


def show_profile(folder: Path) -> None:
    """What the engine does with networks of full size, by operation; on a GPU also for how long that is busy."""
    gpu = torch.cuda.is_available()
    small = make_city(folder / "profiled", FULL_M)
    for name in FULL:
        city = with_model(small, weights=str(full_size(folder, name)), precision="bf16")
        infer(city, group="warm", full=True)
        with torch.profiler.profile() as profile:
            began = time.perf_counter()
            infer(city, group="profile", full=True)
            seconds = time.perf_counter() - began
        events = profile.key_averages()
        busy = sum(e.self_device_time_total for e in events) / 1e6
        print(f"{name}: {seconds:.1f} s" + (f", the GPU busy for {busy / seconds:.0%}" if gpu else ""))
        print(events.table(sort_by="self_cuda_time_total" if gpu else "self_cpu_time_total", row_limit=12))


def show_precision(city: City, folder: Path, runs: int) -> None:
    """bf16 against float32, each in its best batch, and norms folded against not; medians of paired runs."""
    both = {precision: with_model(city, precision=precision) for precision in ("32", "bf16")}
    small = with_model(make_city(folder / "precision", 768.0), weights=str(full_size(folder)))
    large = {precision: with_model(small, precision=precision) for precision in both}
    iou = []
    for chosen in both.values():
        infer(chosen, full=True)
        iou.append(score_city(chosen).subsets["all"]["g_iou"])
    compact = paired(runs, lambda: bare(both["32"], 64), lambda: bare(both["bf16"], 64))
    full = paired(runs, lambda: bare(large["32"], 16), lambda: bare(large["bf16"], 16))
    limit = paired(runs, lambda: convolution(torch.float32), lambda: convolution(torch.bfloat16))
    print(f"bf16 against float32: compact {compact:.2f} ×, CMMPNet-D-LinkNet34 {full:.2f} × (target 2); "
          f"one convolution of 256 channels {limit:.2f} ×; compact g_iou changes by {abs(iou[0] - iou[1]):.5f} (target 0.001)")  # fmt: skip
    folded = {p: paired(runs, lambda c=c: bare(c, 64, folded=False), lambda c=c: bare(c, 64)) for p, c in both.items()}
    print("norms folded: " + ", ".join(f"{gain:.2f} × in {p}" for p, gain in folded.items()))


def paired(runs: int, slow: Callable[[], float], fast: Callable[[], float]) -> float:
    """How many times faster, the median of runs in turn; the first of each warms up."""
    slow(), fast()
    return statistics.median(slow() / fast() for _ in range(runs))


def convolution(dtype: torch.dtype) -> float:
    """Seconds of a 3×3 convolution whose numbers stay in the cache, on one thread: what the chip gives a large one."""
    torch.set_num_threads(1)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(4, 256, 32, 32).to(dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        began = time.perf_counter()
        for _ in range(20):
            conv(x)
    return time.perf_counter() - began


def show_change(folder: Path, tiles: int = 1600) -> None:
    """A dump that touches one per cent of the tiles, in one place: all stages of a refresh against all stages of a full one."""
    city = with_streets(points_city(folder / "wide", tiles))
    plan_refresh(city)  # calibrates
    grid, rng, side = city.make_grid(), np.random.default_rng(1), round((tiles / 100) ** 0.5) * 512.0
    east, north = (rng.uniform(at, at + side, 2000) for at in (grid.bounds.left + 2048, grid.bounds.top - 2048 - side))
    lon, lat = Transformer.from_crs(grid.crs, 4326, always_xy=True).transform(east, north)
    with open_cluster(ClusterSpec(workers=2)) as client:
        whole = refresh_stages(city, client, full=True)
        pq.write_table(pa.table({"lon": lon, "lat": lat}), city.root / "new.parquet")
        part = refresh_stages(city, client, full=False)
    print(
        f"1 % of {grid.n_tiles} tiles changed: {part['windows'] / whole['windows']:.1%} of {whole['windows']:,.0f} windows (target 3 %)"
    )
    seconds = {name: (part[name], whole[name]) for name in whole if name != "windows"}
    for name, (some, every) in seconds.items():
        print(f"  {name:<16} {some:7.1f} s of {every:7.1f} s: {some / every:.1%}")
    some, every = (sum(column) for column in zip(*seconds.values(), strict=True))
    print(f"  all stages       {some:7.1f} s of {every:7.1f} s: {some / every:.1%} (target 5 %)")


def refresh_stages(city: City, client: Client, full: bool) -> dict[str, float]:
    """Seconds of each stage of a refresh without Prefect, and the windows predicted."""
    out: dict[str, float] = {}
    if full:  # nothing is known from before
        for kept in ("scores", "outputs", "export"):
            shutil.rmtree(city.workspace_path / kept, ignore_errors=True)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        made = work()
        out[name] = time.perf_counter() - began
        return made

    def density() -> None:
        model = tune_kde(city, client=client)
        path = write_whole(city.workspace_path / "kde.json", model.model_dump_json())
        infer(city, str(path), "baseline", client, full=full)
        score_city(city, "baseline", client=client)

    def export() -> None:
        reader = MapReader(city)
        for name, how in (("probability", "average"), ("road", "mode")):
            export_array(city, reader, name, how, city.workspace_path / f"export/{name}.tif")

    timed("ingest", lambda: ingest(city, None if full else ["new.parquet"], client=client))
    out["windows"] = timed("predict", lambda: infer(city, client=client, full=full))["windows"]
    timed("score", lambda: score_city(city, client=client))
    timed("kernel density", density)
    timed("export", export)
    timed("report", lambda: (write_report(city, {}, [], {}), map_preview(city)))
    return out


def with_streets(city: City) -> City:
    """The city with labels: straight streets every 250 m."""
    b = city.make_grid().bounds
    across = [shapely.LineString([(b.left, y), (b.right, y)]) for y in np.arange(b.bottom + 50, b.top, 250)]
    along = [shapely.LineString([(x, b.bottom), (x, b.top)]) for x in np.arange(b.left + 50, b.right, 250)]
    gpd.GeoDataFrame(geometry=across + along, crs=city.make_grid().crs).to_file(city.root / "streets.gpkg")
    raw = yaml.safe_load((city.root / "city.yaml").read_text()) | {"labels": {"roads": "streets.gpkg"}}
    (city.root / "city.yaml").write_text(yaml.safe_dump(raw))
    return load_city(city.root / "city.yaml")


def points_city(folder: Path, tiles: int) -> City:
    """A square of 512 px tiles with 500 points in each, and no image, ingested; the image of so large a city takes long to draw."""
    side, rng = round(tiles**0.5), np.random.default_rng(0)
    metres = side * 512.0
    east, north = rng.uniform(500_000, 500_000 + metres, 500 * tiles), rng.uniform(5_200_000, 5_200_000 + metres, 500 * tiles)
    lon, lat = Transformer.from_crs(32633, 4326, always_xy=True).transform(east, north)
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"lon": lon, "lat": lat}), folder / "dump.parquet")
    box = [float(v) for v in (lon.min(), lat.min(), lon.max(), lat.max())]
    spec = {"name": "points", "workspace": "work", "grid": {"bounds": box, "crs": "EPSG:32633", "resolution_m": 1.0, "tile_px": 512},
            "points": {"sources": ["dump.parquet"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"}}  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    city = load_city(folder / "city.yaml")
    ingest(city)
    return city


def show_memory(folder: Path) -> None:
    """Peak memory of a worker process for 16 and for 1,600 tiles."""
    peaks = {}
    for tiles in (16, 1600):
        city = points_city(folder / f"tiles-{tiles}", tiles)
        with open_cluster(ClusterSpec(workers=1)) as client:
            infer(city, "kde", "memory", client, full=True)
            peaks[tiles] = max(client.run(peak_mib).values())
        shutil.rmtree(city.root)
    print(f"peak memory: {peaks[16]:.0f} MiB for 16 tiles, {peaks[1600]:.0f} MiB for 1,600: "
          f"{peaks[1600] / peaks[16] - 1:+.0%} (target within 10 %)")  # fmt: skip


def pin(dask_worker) -> None:
    """One core for a worker and all its threads, by its number."""
    cores = sorted(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {cores[int(dask_worker.name) % len(cores)]})


def show_workers(city: City, runs: int) -> None:
    """Two workers against one, each on a core of its own: a single one would read and write on the other's."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for run in range(runs):
        for workers in (1, 2):
            with open_cluster(ClusterSpec(workers=workers)) as client:
                client.run(pin)
                infer(city, group="warm-up", client=client, full=True)
                began = time.perf_counter()
                infer(city, group=f"workers-{workers}-{run}", client=client, full=True)
                seconds[workers].append(time.perf_counter() - began)
    gain = statistics.median(a / b for a, b in zip(seconds[1], seconds[2], strict=True))
    limit = statistics.median(2 * bare_processes(city, 1) / bare_processes(city, 2) for _ in range(runs))
    print(f"2 workers against 1, a core each: {gain:.2f} × (target 1.8); 2 bare forward passes against 1: {limit:.2f} ×")


def bare_processes(city: City, n: int) -> float:
    """Seconds that n processes side by side take for the forward passes of a city each: the limit that the machine sets."""
    code = ("import sys; from pathlib import Path; from roadfuse_core.settings import load_city; from tests.benchmarks.inference import bare; "
            "print(bare(load_city(Path(sys.argv[1])), 300))")  # fmt: skip
    command = [sys.executable, "-c", code, str(city.root / "city.yaml")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(n)]
    return max(float(p.communicate()[0].split()[-1]) for p in started)


def nothing(job):
    """A block's task without its work: what remains is Dask's."""
    return len(Lattice(256, 128).windows(job.block))


def show_orchestration(city: City) -> None:
    """Dask and Prefect for a window, with tasks that do nothing."""
    from prefect import flow, task

    from roadfuse_core.cluster import run_jobs

    plan = plan_refresh(city, full=True)
    jobs = plan.jobs(Path("/nowhere")) * 20

    @task
    def predict(address):
        from dask.distributed import Client

        with Client(address) as client:
            return sum(run_jobs(client, nothing, jobs, "nothing"))

    @flow
    def refresh(address):
        return predict(address)

    with open_cluster(ClusterSpec(workers=2)) as client:
        refresh(client.scheduler.address)
        began = time.perf_counter()
        windows = refresh(client.scheduler.address)
        print(f"orchestration: {1e3 * (time.perf_counter() - began) / windows:.2f} ms a window of {windows:,} (target 1)")


def as_workers_run() -> None:
    """Begin this process again with the allocator's settings of workers, if they are not set: they are read at its start."""
    if missing := {k: str(v) for k, v in ALLOCATOR.items() if k not in os.environ}:
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)


def main() -> None:
    """Print a line for each target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=float, default=4096.0)
    parser.add_argument("--only", default=",".join(PARTS))
    a, _ = parser.parse_known_args()
    only = a.only.split(",")
    print(f"inference, one thread a worker, tiles of 512 px, {a.runs} paired runs where there are pairs")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        city = make_city(folder / "city", a.size, tile_px=512)
        show_ratios(city, folder, a.runs, only)
        if "bf16" in only:
            show_precision(city, folder, a.runs)
        if "change" in only:
            show_change(folder)
        if "memory" in only:
            show_memory(folder)
        if "workers" in only:
            show_workers(city, a.runs)
        if "orchestration" in only:
            show_orchestration(city)
        if "profile" in only:
            show_profile(folder)


if __name__ == "__main__":
    as_workers_run()
    main()
