"""Publishing a city's map: whatever readers look at shows one and the same map, whoever published it.

The map repository's `main` decides which map that is. Exports, report, history and metrics follow it. After a crash in between,
the next refresh, or the same release or rollback run again, makes those that are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from dask.distributed import Client

from roadfuse_core.cluster import Progress, quiet
from roadfuse_core.cubes import LedgerEntry, cubes_path, ledger, open_repository, read_group, storing
from roadfuse_core.errors import StoreError
from roadfuse_core.files import DamagedFileError, read_record, write_record
from roadfuse_core.inference import (
    MapReader,
    MapRecord,
    export_array,
    map_key,
    maps_path,
    rollback,
    split_of_map,
    standing_record,
    tagged_record,
    waiting,
)
from roadfuse_core.inference import release as publish_candidate
from roadfuse_core.locks import TURN, sole_writer
from roadfuse_core.metrics import (
    Dumps,
    HistoryEntry,
    MapFigures,
    MapScores,
    Reference,
    Verdict,
    append_history,
    current_scores,
    figures_of,
    judge,
    next_reference,
    read_history,
    read_scores,
    rescore,
    score_city,
    scores_to_store,
    stored_reference,
    stored_scores,
    write_metrics,
)
from roadfuse_core.mosaic import write_item
from roadfuse_core.report import write_report
from roadfuse_core.settings import City

__all__ = ["Publication", "decide", "export_published", "outputs_lock", "record_run", "release", "roll_back", "score_map"]

LAYERS: tuple[tuple[str, Literal["average", "mode"]], ...] = (("probability", "average"), ("road", "mode"))
LONG = ("identity", "failed", "learnt", "scores", "gate")  # parts of a record that the history leaves out
RESCORED = "labels or test tiles are others than before: the published map was scored on them again"


@dataclass(frozen=True)
class Publication:
    """A map that was published by a person, with everything that follows it.

    Attributes:
        record: Of the map.
        files: What shows it, by name.
        tag: Of a rollback; empty for a release.
        resumed: The step had been interrupted before, and was only finished now.
    """

    record: MapRecord
    files: dict[str, Path]
    tag: str = ""
    resumed: bool = False


@contextmanager
def outputs_lock(city: City) -> Iterator[None]:
    """Hold the only right to write what shows the city's map: a release or rollback does from its start to its end.

    A refresh has it too, as its turn, and waits for it.

    Raises:
        StoreError: Another process has it.
    """
    with sole_writer(city.workspace_path, (TURN,), f"release or rollback of {city.name}"):
        yield


def score_map(
    city: City, group: str = "map", tell: Progress = quiet, client: Client | None = None, held: bool = False
) -> MapScores:
    """Scores of a map: those that are stored, where they are of this map, these labels and these points, or new ones."""
    return current_scores(city, group, held) or score_city(city, group, tell, client, held)


def decide(city: City, key: str, scored: MapScores | None, tell: Progress = quiet, client: Client | None = None) -> Verdict:
    """Publish the candidate of a key if the gate passes it; its scores are stored with it.

    Args:
        city: The city.
        key: Of the candidate that was scored.
        scored: Its scores; None for a city without labels.
        tell: Progress.
        client: Dask, for a published map that has to be scored on other labels than before.

    Raises:
        StoreError: Another candidate waits by now, or none.
    """
    record = _candidate(city, key)
    new = figures_of(city.make_grid(), record, scored)
    published, reference, notes = _published_figures(city, record, scored, tell, client)
    verdict = judge(city.gate, new, published, reference, _dumps(city))
    verdict = Verdict(verdict.reasons, (*notes, *verdict.notes))
    if verdict.passed:
        publish_candidate(city, "map", key, _facts(scored, verdict, next_reference(new, reference)))
    return verdict


def _candidate(city: City, key: str | None) -> MapRecord:
    record = waiting(city)
    if record is None:
        raise StoreError(f"{city.workspace_path}: no map is held back on top of what is published; run `roadfuse refresh`")
    if key is not None and map_key(record) != key:
        line = f"{city.workspace_path}: map {map_key(record)} is held back now, not {key}"
        raise StoreError(f"{line}; look at that one, then release it")
    return record


def _published_figures(
    city: City, new: MapRecord, scored: MapScores | None, tell: Progress, client: Client | None
) -> tuple[MapFigures | None, Reference | None, list[str]]:
    """Figures of the published map on the same labels and tiles as the candidate's, what drift counts from, and notes."""
    found = standing_record(city, "map")
    if found is None:
        return None, None, []
    _, record = found
    before, notes = stored_scores(record), list[str]()
    if scored is not None and (before is None or before.on.basis != scored.on.basis):
        notes = [RESCORED] if before else ["the published map had no scores stored: it was scored again"]
        before = rescore(city, split_of_map(city, new), tell, client)
    figures = figures_of(city.make_grid(), record, before)
    stored = stored_reference(record)
    return figures, next_reference(figures, stored), notes


def _dumps(city: City) -> Dumps:
    """Dumps that the published map has, and those that came since."""
    found = standing_record(city, "map")
    if found is None or city.points is None:
        return Dumps()
    entries = ledger(city)
    names = _dumps_at(city, found[1], entries)
    return Dumps([d for name, d in entries.items() if name in names], [d for name, d in entries.items() if name not in names])


def _dumps_at(city: City, record: MapRecord, entries: dict[str, LedgerEntry]) -> set[str]:
    """Names of the dumps of which a map was made."""
    snapshot = record["cubes_snapshot"]
    if snapshot is None:
        return set()
    repository = open_repository(cubes_path(city))
    if snapshot in {s.id for s in repository.ancestry(branch="main")}:
        return set(read_group(repository, snapshot=snapshot)["ledger"].attrs["dumps"])
    # It was expired: by the clock, then; a record states whole seconds.
    made = datetime.fromisoformat(record["made"]) + timedelta(seconds=1)
    return {name for name, d in entries.items() if datetime.fromisoformat(d["committed"]) < made}


def _facts(scored: MapScores | None, verdict: Verdict, reference: Reference) -> dict[str, Any]:
    """What the record of a map says of its publication."""
    stored = scores_to_store(scored) if scored else None
    return {
        "scores": stored,
        "gate": {"reasons": list(verdict.reasons), "notes": list(verdict.notes), "reference": asdict(reference)},
    }


def release(city: City, key: str | None = None, tell: Progress = quiet) -> Publication:
    """Publish the map that the gate held back, with exports, report, history and metrics; the gate counts from it.

    A release that was interrupted is finished when it is run again.

    Args:
        city: The city.
        key: Only the candidate of this key; by default whichever waits.
        tell: Progress.

    Raises:
        StoreError: None waits, another one does, another process is writing, or the disk is full.
    """
    open_repository(maps_path(city))  # where there are no maps, nothing is written
    with outputs_lock(city):
        resumed = _resume(city, tell)
        if resumed and (waiting(city) is None or map_key(resumed.record) == key):
            return resumed
        record = _candidate(city, key)
        scored = score_map(city, tell=tell, held=True) if city.labels else None
        new = figures_of(city.make_grid(), record, scored)
        published, reference, notes = _published_figures(city, record, scored, tell, None)
        verdict = judge(city.gate, new, published, reference, _dumps(city))
        facts = _facts(scored, Verdict(verdict.reasons, (*notes, *verdict.notes)), next_reference(new, None))
        _mark(city, "release", map_key(record))
        publish_candidate(city, "map", map_key(record), facts)
        return Publication(record, _follow(city, "release", tell))


def roll_back(city: City, to: str | None = None, tell: Progress = quiet) -> Publication:
    """Make an earlier map the published one again, with exports, report, history and metrics; the points stay as they are.

    A rollback that was interrupted is finished when it is run again, and goes back no further.

    Args:
        city: The city.
        to: A tag that `published` lists; by default the map from which the published one came.
        tell: Progress.

    Raises:
        StoreError: There is no such map, another process is writing, or the disk is full.
    """
    open_repository(maps_path(city))  # where there are no maps, nothing is written
    with outputs_lock(city):
        resumed = _resume(city, tell)
        if resumed and to is None:
            return resumed
        to = rollback(city, to, dry_run=True)
        _mark(city, "rollback", map_key(tagged_record(city, to)))
        rollback(city, to)
        return Publication(MapReader(city).record, _follow(city, "rollback", tell), to)


def _marker(city: City) -> Path:
    return city.workspace_path / "outputs/unfinished.json"


def _mark(city: City, action: str, key: str) -> None:
    """Write down what is about to be published: a crash from here on is noticed."""
    with storing(city.workspace_path):
        write_record(_marker(city), {"action": action, "map": key})


def _resume(city: City, tell: Progress) -> Publication | None:
    """Finish a release or rollback that published its map and was interrupted before everything followed; None without one."""
    try:
        begun = read_record(_marker(city))
    except (FileNotFoundError, DamagedFileError):
        return None
    found = standing_record(city, "map")
    if found is None or map_key(found[1]) != begun["map"]:
        _marker(city).unlink()  # it was interrupted before it published anything
        return None
    return Publication(found[1], _follow(city, begun["action"], tell), resumed=True)


def _follow(city: City, action: Literal["release", "rollback"], tell: Progress) -> dict[str, Path]:
    """Everything that shows the published map, made to show it."""
    record = MapReader(city).record
    overruled = record["gate"]["reasons"] if action == "release" else ()
    try:
        scored = _scores_beside(city, tell)
        files = export_published(city)
        files["report"] = write_report(city, scored, [], files)
        record_run(city, record, scored, tuple(overruled), action=action)
    except (StoreError, OSError) as error:
        line = f"map {map_key(record)} is published, but its files are not complete"
        raise StoreError(f"{line}: {error}; run the same command again") from error
    return files


def _scores_beside(city: City, tell: Progress) -> dict[str, MapScores]:
    """Scores of the published map, and of kernel density where they are of the same tiles and labels."""
    if not city.labels:
        return {}
    scored = {"map": score_map(city, tell=tell)}
    beside = read_scores(city, "baseline")
    found = standing_record(city, "baseline")
    if beside and found and beside.on.map == map_key(found[1]) and beside.on.basis == scored["map"].on.basis:
        scored["baseline"] = beside
    return scored


def record_run(
    city: City, record: MapRecord, scored: dict[str, MapScores], reasons: tuple[str, ...] = (), seconds: float = 0.0,
    action: Literal["refresh", "release", "rollback"] = "refresh",
) -> None:  # fmt: skip
    """Add a run to the history and the metrics; the last step of what publishes a map.

    Args:
        city: The city.
        record: Of the map that was made or published.
        scored: Its scores, and those beside it.
        reasons: Why a refresh held it back; of a release, why it had been.
        seconds: That the run took.
        action: Which run.
    """
    entry = HistoryEntry(
        action=action, published=action != "refresh" or not reasons, reasons=reasons,
        record={k: v for k, v in record.items() if k not in LONG} | {"map": map_key(record)},
        scores={group: found.subsets for group, found in scored.items()}, seconds=seconds,
        windows_failed=len(record["failed"]),
    )  # fmt: skip
    if action == "refresh" or not _already_there(city, entry):
        append_history(city, entry)
    write_metrics(city, entry, list(ledger(city).values()) if city.points else [])
    _marker(city).unlink(missing_ok=True)


def _already_there(city: City, entry: HistoryEntry) -> bool:
    """Whether the history ends with this entry, from a step that was interrupted behind it."""
    last = next(reversed(read_history(city)), None)
    return last is not None and (last.action, last.record.get("map")) == (entry.action, entry.record["map"])


def export_published(city: City) -> dict[str, Path]:
    """Probability and road of the published map as cloud-optimised GeoTIFF, and a STAC item beside them.

    Files that show that map already stay as they are; tiles that it shares with the map of the files are not made again.

    Returns:
        Paths by name.

    Raises:
        StoreError: There is no map yet, or a file cannot be written.
    """
    reader, out = MapReader(city), city.workspace_path / "export"
    files = {name: export_array(city, reader, name, how, out / f"{city.name}-{name}.tif") for name, how in LAYERS}
    made = datetime.fromisoformat(reader.record["made"])
    facts = {"roadfuse:map": reader.key, "roadfuse:model": reader.record["model_digest"],
             "roadfuse:cubes_snapshot": reader.record["cubes_snapshot"]}  # fmt: skip
    item = write_item(out / f"{city.name}.json", city.name, city.make_grid(), files, made, facts)
    return {**files, "stac item": item}
