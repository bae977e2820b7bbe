"""The commands of those on call: release, rollback, serve, expire."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from flows.console import CityFile, console, prepare_prefect, set_prefect_defaults
from roadfuse_core.errors import NothingPublishedError
from roadfuse_core.settings import load_city
from roadfuse_core.workspace import require_workspace

if TYPE_CHECKING:
    from roadfuse_core.publication import Publication

__all__ = ["app"]

app = typer.Typer()


@app.command()
def release(
    city_file: CityFile,
    candidate: Annotated[
        str | None, typer.Option(metavar="MAP", help="Only this one, as the refresh named it; by default whichever waits.")
    ] = None,
) -> None:
    """Publish the map that the gate held back, with its exports and report; the gate counts from it."""
    from roadfuse_core.publication import release as publish_held
    from tasks.progress import ConsoleProgress

    with ConsoleProgress() as tell:
        done = publish_held(load_city(city_file), candidate, tell)
    _show_publication(done)


@app.command()
def rollback(
    city_file: CityFile,
    to: Annotated[str | None, typer.Option(metavar="TAG", help="A published map; by default the one before.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the published maps, say which, and change nothing.")] = False,
) -> None:
    """Make an earlier map the published one again, with its exports and report; the points stay as they are."""
    from roadfuse_core.inference import published
    from roadfuse_core.inference import rollback as plan_rollback
    from roadfuse_core.publication import roll_back
    from tasks.progress import ConsoleProgress

    city = load_city(city_file)
    if dry_run:
        for tag, made in published(city):
            console.print(f"{tag}  {made:%Y-%m-%d %H:%M:%S} UTC")
        console.print(f"would publish {plan_rollback(city, to, dry_run)}")
        return
    with ConsoleProgress() as tell:
        done = roll_back(city, to, tell)
    _show_publication(done)


def _show_publication(done: Publication) -> None:
    if done.resumed:
        console.print("the last release or rollback had been interrupted; it is complete now, and nothing else was changed")
    console.print(f"published {done.tag or 'the map'}, made {done.record['made']} by {done.record['model']}")
    for name, path in done.files.items():
        console.print(f"{name:<12} {path}")


@app.command()
def serve(
    city_file: CityFile,
    cron: Annotated[str, typer.Option(help="When to refresh, UTC.")] = "0 3 * * 1",
    watch_s: Annotated[int, typer.Option("--watch", min=0, help="Look for new dumps every so many seconds; 0 never.")] = 0,
) -> None:
    """Refresh a city on a schedule from this machine, without a work pool; stop it with Ctrl-C."""
    from flows.server import check_cron, require_server, serve_city

    city = load_city(city_file)
    set_prefect_defaults()
    check_cron(cron)
    require_workspace(city.workspace_path)
    require_server()
    prepare_prefect()
    serve_city(city, city_file.resolve(), cron, watch_s)


@app.command()
def expire(
    city_file: CityFile,
    days: Annotated[float, typer.Option("--older-than", min=0, help="Days; younger snapshots stay.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count and remove nothing.")] = False,
) -> None:
    """Forget old snapshots, but for what the published map was made of, and sweep what crashes left."""
    from roadfuse_core.cubes import expire as expire_snapshots
    from roadfuse_core.inference import MapReader

    city = load_city(city_file)
    try:
        keep = MapReader(city).record.get("cubes_snapshot")
    except NothingPublishedError:
        keep = None
    done = expire_snapshots(city, datetime.now(UTC) - timedelta(days=days), dry_run, keep)
    told = f"{done.snapshots} snapshots, {done.bytes / 1e6:,.1f} MB that nothing refers to, {done.leftovers} leftovers"
    console.print(f"{'would forget' if dry_run else 'forgot'} {told}; the ledger and the newest snapshots stay")
