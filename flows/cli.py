"""The `roadfuse` command. Plain commands never import Prefect."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from flows import operation_commands, points_commands, training_commands
from flows.console import AsJson, CityFile, console, prepare_prefect, print_json
from flows.points_commands import show_ledger, show_notes, show_skipped
from roadfuse_core.errors import ConfigError, NothingPublishedError, RoadFuseError, StoreError
from roadfuse_core.settings import City, load_city, parse_assignments

__all__ = ["app", "main"]

app = typer.Typer(help="City road maps from aerial images and vehicle trajectories.", no_args_is_help=True,
                  pretty_exceptions_enable=False, add_completion=False)  # fmt: skip
app.add_typer(points_commands.app)
app.add_typer(training_commands.app)
app.add_typer(operation_commands.app)
HELD_BACK = 8  # exit code of a refresh whose map waits for its release


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the simulated city.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Another seed, another city; shipped weights know 1000 and above.")] = 7,
    size_m: Annotated[float, typer.Option(help="Edge of the city, metres.")] = 2048.0,
    server: Annotated[bool, typer.Option("--server", help="Start a Prefect server for it, and leave its UI open.")] = False,
) -> None:
    """Simulate a city and refresh it, end to end."""
    if server:
        _demo_on_a_server(out.resolve(), seed, size_m)
        return
    prepare_prefect()
    from flows.demo import demo as flow

    _show_refresh(flow(out.resolve(), seed, size_m))


def _demo_on_a_server(out: Path, seed: int, size_m: float) -> None:
    """The demo as operators see it: its run in the UI, and the city's deployments, until Ctrl-C."""
    from flows.server import serve_city, start_server

    console.print("starting a Prefect server", style="dim")
    with start_server(out / "prefect") as address:
        os.environ["PREFECT_API_URL"] = f"{address}/api"
        prepare_prefect()
        from flows.demo import demo as flow

        _show_refresh(flow(out, seed, size_m))
        console.print(f"Prefect UI: {address}/dashboard\nStop it with Ctrl-C.")
        serve_city(load_city(out / "city.yaml"), out / "city.yaml", "0 3 * * 1")


@app.command()
def refresh(
    city_file: CityFile,
    baseline: Annotated[bool, typer.Option(help="Also score kernel density, tuned on the training tiles.")] = True,
    full: Annotated[bool, typer.Option("--full", help="Predict everything anew, not only what changed.")] = False,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Publish although windows failed; they are no data.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be predicted now, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a city's map up to date: ingest, predict, score, export, report."""
    city = load_city(city_file)
    if plan:
        _show_refresh_plan(city, full, as_json)
        return
    prepare_prefect()
    from flows.refresh import refresh as flow

    result = flow(city_file.resolve(), baseline, full, allow_incomplete)
    print_json(result) if as_json else _show_refresh(result)
    if result["held"]:
        sys.exit(HELD_BACK)


def _show_refresh_plan(city: City, full: bool, as_json: bool) -> None:
    from roadfuse_core.inference import plan_refresh

    made = plan_refresh(city, full=full)
    c, jobs = made.calibration, made.jobs(Path())
    map_bytes = int(made.coverage.cells.sum()) * made.lattice.stride_px**2 * (len(made.planes) + 1)
    facts = {
        "windows": made.windows, "of": made.of, "blocks": len(jobs), "batches": -(-made.windows // c.batch), "batch": c.batch,
        "precision": c.precision, "device": c.device, "memory_bytes": made.memory_bytes, "seconds": made.seconds,
        "map_bytes": map_bytes, "full": made.why,
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    why = f"everything, because {made.why}" if made.why else "only what changed, and what blends with it"
    console.print(f"{made.windows:,} of {made.of:,} windows that may hold evidence, {why}")
    console.print(f"{len(jobs):,} blocks, {facts['batches']:,} batches of {c.batch}, {c.precision} on {c.device}")
    console.print(f"up to {map_bytes / 1e6:,.1f} MB of map before compression; {made.memory_bytes / 2**30:.2f} GiB a worker")
    console.print(f"about {made.seconds:,.0f} s; dumps that are not ingested yet are not counted: roadfuse ingest --dry-run")


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder for the city.")],
    seed: Annotated[int, typer.Option(help="Another seed, another city.")] = 0,
    knob: Annotated[list[str] | None, typer.Option("--set", metavar="KNOB=VALUE", help="Any knob, such as canopy=0.8.")] = None,
    knobs: Annotated[bool, typer.Option("--knobs", help="List the knobs and stop.")] = False,
) -> None:
    """Write a simulated city with imagery, dumps, truth and a city file."""
    from roadfuse_core.simulate import CityKnobs, simulate_city
    from tasks.progress import ConsoleProgress

    if knobs:
        table = Table("knob", "default", "meaning", box=None)
        for name, field in CityKnobs.model_fields.items():
            default = "" if name == "dirt" else str(field.default)
            table.add_row(name, default, field.description)
        console.print(table)
        return
    chosen = _knobs(seed, knob or [])
    with ConsoleProgress() as tell:
        path = simulate_city(out, chosen, os.cpu_count() or 1, tell)
    console.print(f"city file  {path}")


def _knobs(seed: int, assignments: list[str]) -> Any:
    from pydantic import ValidationError

    from roadfuse_core.simulate import CityKnobs

    given = parse_assignments("--set", assignments, "canopy=0.8")
    if unknown := [name for name in given if name not in CityKnobs.model_fields]:
        raise ConfigError("--set", unknown[0], "is not a knob", "see roadfuse simulate x --knobs")
    try:
        return CityKnobs.model_validate({"seed": seed} | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError("--set " + ".".join(map(str, first["loc"])), first["input"], "is wrong", first["msg"]) from error


@app.command()
def check(city_file: CityFile) -> None:
    """Validate a city file against its data; writes nothing."""
    from roadfuse_core.check import check_city

    for line in check_city(load_city(city_file)):
        console.print(line)
    console.print(Text.assemble(("ready", "green"), f": roadfuse refresh {city_file}"))


@app.command()
def tune(
    city_file: CityFile,
    out: Annotated[Path, typer.Option(help="Where the model goes; use it as model.weights.")] = Path("kde.json"),
) -> None:
    """Tune kernel density (kernel and threshold) on a city's training tiles."""
    from roadfuse_core.metrics import tune_kde
    from tasks.progress import ConsoleProgress

    with ConsoleProgress() as tell:
        model = tune_kde(load_city(city_file), tell)
    out.write_text(model.model_dump_json(indent=1) + "\n")
    console.print(f"sigma {model.sigma_m} m, threshold {model.threshold_per_m2:.4g} points/m²: {model.tuned_on}")
    console.print(f"model  {out}")


@app.command()
def evaluate(
    city_files: Annotated[list[Path], typer.Argument(metavar="CITY.yaml …", help="The city file; several with --suite.")],
    group: Annotated[str, typer.Option(help="map or baseline")] = "map",
    suite: Annotated[bool, typer.Option("--suite", help="Score networks under worse and worse evidence.")] = False,
    weights: Annotated[list[str] | None, typer.Option(help="With --suite: networks, instead of the city's.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --suite: folder for suite.csv and suite.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score the published map against the labels, or networks on the test tiles under damaged evidence."""
    from roadfuse_core.metrics import describe_tiles, score_city
    from tasks.progress import ConsoleProgress

    cities = [load_city(path) for path in city_files]
    if suite:
        _evaluate_suite(cities, weights or [cities[0].model.weights], out, as_json)
        return
    if len(cities) > 1:
        raise ConfigError("CITY.yaml", len(cities), "cities are for --suite alone", "score them one by one")
    with ConsoleProgress() as tell:
        scored = score_city(cities[0], group, tell)
    if as_json:
        print_json(scored.subsets | {"tiles": {"from": scored.on.tiles_from, "overlap": scored.on.overlap}})
        return
    _show_scores({group: scored.subsets})
    console.print(describe_tiles(scored))


def _evaluate_suite(cities: list[City], weights: list[str], out: Path | None, as_json: bool) -> None:
    from roadfuse_core.inference import choose_weights, resolve_weights
    from roadfuse_core.training import run_suite
    from tasks.progress import ConsoleProgress

    folder = out or cities[0].workspace_path / "suite"
    with ConsoleProgress() as tell:
        found = run_suite(
            cities, [resolve_weights(choose_weights(cities[0], w), Path.cwd()).path for w in weights], folder, tell
        )
    if as_json:
        print_json(found.to_dict("records"))
        return
    table = Table("damage", "level", *dict.fromkeys(found.network), box=None)
    for (family, level), rows in found.groupby(["family", "level"], sort=False):
        table.add_row(str(family), f"{level:g}", *(f"{v:.3f}" for v in rows.groupby("network", sort=False).g_iou.mean()))
    console.print(table)
    for row in found.drop_duplicates(["city", "network"]).itertuples():
        console.print(f"{row.city}, {row.network}: {row.tiles} tiles, {row.tiles_from}")
    console.print(f"curves  {folder / 'suite.html'}\nfigures {folder / 'suite.csv'}")


@app.command()
def export(
    city_file: CityFile,
    layer: Annotated[str, typer.Argument(help="count, another array of the cube, probability, road or a gate.")],
    out: Annotated[Path, typer.Option(help="The GeoTIFF to write.")],
) -> None:
    """Write a layer of the whole city as a cloud-optimised GeoTIFF."""
    from roadfuse_core.cubes import CubeReader, cubes_path
    from roadfuse_core.inference import MapReader
    from roadfuse_core.mosaic import NODATA, write_cog

    city = load_city(city_file)
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise ConfigError("--out", str(out), "is no name for a GeoTIFF", "end it in .tif")
    if layer in ("probability", "road") or layer.startswith("gate_"):
        reader = MapReader(city)
        if layer not in reader.arrays:
            raise ConfigError("layer", layer, "is not in this map", f"it has {', '.join(reader.arrays)}")
        overview: Literal["average", "mode"] = "mode" if layer == "road" else "average"
        write_cog(out, city.make_grid(), lambda *w: reader.window(layer, *w), "uint8", NODATA, overview)
    else:
        cube = CubeReader(cubes_path(city))
        if layer not in cube.arrays:
            raise ConfigError("layer", layer, "is not in this city", f"use probability, road, {', '.join(cube.arrays)}")
        write_cog(out, city.make_grid(), lambda *w: cube.window(layer, *w), "int64", None, "average")
    console.print(f"{layer}  {out}")


@app.command()
def status(city_file: CityFile, as_json: AsJson = False) -> None:
    """Dumps in the ledger, snapshots of the cube, and the published map."""
    from roadfuse_core.cubes import ledger, other_settings, read_skipped, snapshots
    from roadfuse_core.inference import MapReader

    city = load_city(city_file)
    dumps = list(ledger(city).values())
    try:
        record: dict[str, Any] | None = MapReader(city).record
    except NothingPublishedError:
        record = None
    if as_json:
        notes = other_settings(city) if city.points else []
        snapshot_rows = [asdict(s) for s in snapshots(city)]
        skipped = [asdict(s) for s in read_skipped(city)]
        print_json({"dumps": dumps, "snapshots": snapshot_rows, "map": record, "notes": notes, "skipped": skipped})
        return
    show_ledger(dumps)
    show_skipped(read_skipped(city))
    show_notes(city)
    for s in snapshots(city):
        console.print(f"snapshot {s.id}  {s.made:%Y-%m-%d %H:%M:%S}  {s.message}")
    console.print(f"map  {record['made']} by {record['model']}" if record else "no map yet: roadfuse refresh")


@app.command()
def models(as_json: AsJson = False) -> None:
    """Networks by name: paper, inputs, size, and operations for a window of 512²."""
    from roadfuse_core.models import PRESETS, describe

    rows: list[dict[str, Any]] = [
        {"preset": name, "paper": p.paper, "modalities": p.config.modalities, "width": p.config.width}
        | asdict(describe(p.config))
        for name, p in PRESETS.items()
    ]  # fmt: skip
    if as_json:
        print_json(rows)
        return
    table = Table("preset", "paper", "modalities", "width", "parameters", "GFLOPs", "window multiple", box=None)
    for r in rows:
        inputs = " + ".join(f"{k} ({v})" for k, v in r["modalities"].items())
        sizes = f"{r['parameters']:,}", f"{r['gflops']:.1f}", str(r["window_multiple"])
        table.add_row(r["preset"], r["paper"], inputs, f"{r['width']:g}", *sizes)
    console.print(table)


def _show_refresh(result: dict[str, Any]) -> None:
    from roadfuse_core.inference import map_key

    _show_scores(result["scores"])
    for reason in result["held"]:
        console.print(f"held back: {reason}", style="yellow")
    if result["held"]:
        console.print("the map before stays published; to publish this one: roadfuse release CITY.yaml --candidate "
                      f"{map_key(result['record'])}")  # fmt: skip
    for name, path in result["files"].items():
        console.print(f"{name:<12} {path}")


def _show_scores(scored: dict[str, Any]) -> None:
    if not scored:
        console.print("no labels, no scores")
        return
    figures = ("g_iou", "a_iou", "a_iou_batch8", "precision", "recall", "f1")
    table = Table("map", "on", "tiles", *figures, box=None)
    names = {"map": "this map", "baseline": "kernel density"}
    for subset in ("test", "all", "test_near", "all_near"):
        for group, by in scored.items():
            if subset in by:
                values = [f"{by[subset][k]:.3f}" for k in figures]
                table.add_row(names.get(group, group), subset.replace("_", ", "), str(by[subset]["tiles"]), *values)
    console.print(table)
    console.print("near: only pixels within 20 m of a point")


def main() -> None:
    """Run the command; errors become one line each and an exit code."""
    code = 1  # of a fault that nobody foresaw, which Python shows
    # Registered first, so that it runs last: libraries written in C++ now and then abort while the system tears them down,
    # after everything of ours is done, and would turn the exit code into a signal.
    atexit.register(lambda: _leave(code))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file's name may be no UTF-8
    try:
        app()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except RoadFuseError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        code = error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'disk'}: {error.strerror or error}; mend it and run again\n")
        code = StoreError.exit_code
    sys.exit(code)


def _leave(code: int) -> None:
    try:
        sys.stdout.flush()
    except OSError:  # what was printed is lost
        code = code or StoreError.exit_code
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
