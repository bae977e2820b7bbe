"""The commands that bring points into the cube: ingest, backfill; and how a ledger is shown."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.console import AsJson, CityFile, console, print_json
from roadfuse_core.errors import DataError, printable
from roadfuse_core.settings import City, load_city

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roadfuse_core.cubes import IngestPlan, SkippedFile

__all__ = ["app", "show_ledger", "show_notes", "show_skipped"]

app = typer.Typer()
# Points of a tile and period from which dense chunks pay.
DENSE = 10_000


@app.command()
def ingest(
    city_file: CityFile,
    files: Annotated[list[str] | None, typer.Argument(help="Files or globs instead of points.sources.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and stop.")] = False,
    replace: Annotated[str | None, typer.Option(metavar="DUMP", help="A dump that leaves the cube in the same step.")] = None,
    quarantine: Annotated[Path | None, typer.Option(metavar="DIR", help="Write rejected rows there, with reasons.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring new dumps into the cube, wholly or not at all."""
    from roadfuse_core.cluster import on_cores, open_cluster
    from roadfuse_core.cubes import ingest as ingest_dumps
    from roadfuse_core.cubes import plan_ingest, read_skipped
    from tasks.progress import ConsoleProgress

    city = load_city(city_file)
    plan = plan_ingest(city, files, replace)
    if dry_run or not plan.dump or plan.dump == replace:
        _show_plan(city, plan, as_json, replace)
        if not dry_run and not files and (plan.skipped or read_skipped(city)):
            ingest_dumps(city, replace=replace)  # writes down what is left out
            _refuse_damaged(city)
        return
    city = on_cores(city)
    with open_cluster(city.cluster) as client, ConsoleProgress() as tell:
        entry = ingest_dumps(city, files, client, tell, replace, quarantine)
    if as_json:
        print_json(entry)
    else:
        skipped = read_skipped(city) if not files else []
        _show_entry(entry, skipped)
        show_skipped(skipped)
        show_notes(city)
    if entry is None and not files:
        _refuse_damaged(city)


@app.command()
def backfill(
    city_file: CityFile,
    since: Annotated[datetime, typer.Option("--from", help="First time, UTC.")],
    until: Annotated[datetime, typer.Option("--to", help="First time after the range, UTC.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and stop.")] = False,
) -> None:
    """Bring new files that hold times of a range into the cube, as one dump; files are taken whole."""
    from roadfuse_core.cluster import on_cores, open_cluster
    from roadfuse_core.cubes import files_between, plan_ingest
    from roadfuse_core.cubes import ingest as ingest_dumps
    from tasks.progress import ConsoleProgress

    city = load_city(city_file)
    chosen = files_between(city, plan_ingest(city), since, until)
    for file in chosen:
        console.print(printable(file.label), markup=False)
    console.print(f"{len(chosen)} new files hold times in the range")
    if not chosen:
        return
    if dry_run:
        _show_plan(city, plan_ingest(city, chosen), False)
        return
    city = on_cores(city)
    with open_cluster(city.cluster) as client, ConsoleProgress() as tell:
        entry = ingest_dumps(city, chosen, client, tell)
    _show_entry(entry)


def _show_plan(city: City, plan: IngestPlan, as_json: bool, replace: str | None = None) -> None:
    from roadfuse_core.cubes import forecast

    facts: dict[str, Any] = {"dump": plan.dump or None, "new_files": len(plan.files), "known_files": len(plan.known),
                             "bytes": sum(f["size"] for f in plan.files), "rows": plan.rows, "slices": plan.slices}  # fmt: skip
    told = forecast(city, plan) if plan.dump else None
    if as_json:
        print_json(facts | {"forecast": asdict(told) if told else None})
        return
    console.print(f"{len(plan.files)} new files, {facts['bytes'] / 1e6:,.1f} MB, about {plan.rows:,} rows in "
                  f"{plan.slices} slices; {len(plan.known)} files are already in the ledger")  # fmt: skip
    if plan.copies:
        console.print(f"{len(plan.copies)} files are copies of others and are not read again: {', '.join(plan.copies[:5])}",
                      markup=False)  # fmt: skip
    for source in plan.archived:
        console.print(f"{source} matches no file now; what it once matched is in the ledger", markup=False)
    show_skipped(plan.skipped)
    if replace and plan.dump in ("", replace):
        why = "it was made of these files with these settings" if plan.dump else "there is no new file to take its place"
        console.print(f"dump {replace} stays as it is: {why}", style="yellow", markup=False)
    show_notes(city)
    if told is None:
        return
    chunk = f"{told.points_per_chunk:,.0f} points a tile and period"
    console.print(f"by {told.sampled:,} rows of some files: {told.kept:.1%} fall on the grid, in {told.tiles:,} tiles and "
                  f"{told.periods} periods; {chunk}, {told.chunks:,} chunks, about {told.seconds:,.0f} s")  # fmt: skip
    if told.points_per_chunk < DENSE:
        console.print(f"fewer than {DENSE:,}: a longer period or larger tiles would save space and time", style="yellow")


def show_skipped(skipped: Sequence[SkippedFile]) -> None:
    """Files that are in no dump yet, and why."""
    for file in skipped:
        console.print(f"left out: {file.reason}", style="yellow")


def _refuse_damaged(city: City) -> None:
    """An ingest that brought nothing, because all that is new is damaged, is no success."""
    from roadfuse_core.cubes import read_skipped

    damaged = [file for file in read_skipped(city) if file.damaged]
    if damaged:
        raise DataError(damaged[0].reason)


def show_notes(city: City) -> None:
    """Dumps that were read with other settings than the city file has now."""
    from roadfuse_core.cubes import other_settings

    for line in other_settings(city) if city.points else ():
        console.print(line, style="yellow", markup=False)


def _show_entry(entry: dict[str, Any] | None, skipped: Sequence[SkippedFile] = ()) -> None:
    if entry:
        show_ledger([entry])
    elif not skipped:  # there were new files when the command began
        console.print("nothing is new any more: another run ingested these files meanwhile")


def show_ledger(dumps: list[dict[str, Any]]) -> None:
    """The ledger as a table, with what is suspected of each dump below it."""
    table = Table("dump", "files", "from", "to", "rows", "kept", "rejected", box=None)
    for d in dumps:
        why = ", ".join(f"{k} {v:,}" for k, v in d["rejected"].items()) or "none"
        table.add_row(d["dump"], str(len(d["files"])), *(d["time"] or ("–", "–")), f"{d['rows']:,}", f"{d['kept']:,}", why)
    console.print(table if dumps else "no dumps yet")
    for d in dumps:
        for warning in d.get("time_warnings", []):
            console.print(f"dump {d['dump']}: {warning}", style="yellow")
        if found := d["speed_break"]:
            ratio = f"{found['before']:g} before {found['day']} and {found['after']:g} from then on"
            advice = f"speeds are likely in {found['likely_unit']}; ingest the two parts with a speed_unit each"
            told = f"dump {d['dump']}: reported / implied speed is {ratio}: {found['wrong']} it, {advice}"
            console.print(told, style="yellow")
