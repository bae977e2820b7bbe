"""Whether a new map may replace the published one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from roadfuse_core.cubes import LedgerEntry
from roadfuse_core.grid import Grid
from roadfuse_core.inference import MapRecord
from roadfuse_core.metrics._city import MapScores, ScoredOn
from roadfuse_core.settings import GateSpec

__all__ = ["Dumps", "MapFigures", "Reference", "Verdict", "figures_of", "judge", "next_reference", "scores_to_store",
           "stored_reference", "stored_scores"]  # fmt: skip


@dataclass(frozen=True)
class MapFigures:
    """What the gate compares of a map.

    Attributes:
        mapped_px: Pixels with data.
        road_px: Pixels of road.
        g_iou: On the test tiles, or on all tiles where no test tile has labels; None where it is no number.
        basis: Digest of labels and test tiles; None without labels.
    """

    mapped_px: int
    road_px: int
    g_iou: float | None = None
    basis: str | None = None

    @property
    def road_share(self) -> float:
        """Road of what is mapped."""
        return self.road_px / self.mapped_px if self.mapped_px else 0.0


@dataclass(frozen=True)
class Reference:
    """The best figures since a person last released a map: many small losses add up against them.

    Attributes:
        mapped_px: The most pixels with data.
        road_share: Of the map that a person released last, or of the first one.
        g_iou: The highest.
        basis: What that g_iou was measured on.
    """

    mapped_px: int
    road_share: float
    g_iou: float | None = None
    basis: str | None = None


@dataclass(frozen=True)
class Dumps:
    """Dumps of the ledger.

    Attributes:
        published: Those of which the published map was made.
        new: Those since.
    """

    published: Sequence[LedgerEntry] = ()
    new: Sequence[LedgerEntry] = ()


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        reasons: Why the map is held back; empty where it may be published.
        notes: What could not be compared, and what stood in for it.
    """

    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the map may be published."""
        return not self.reasons


def figures_of(grid: Grid, record: MapRecord, scored: MapScores | None) -> MapFigures:
    """What the gate compares of a map, from its record and its scores."""
    height, width = grid.shape
    mapped_px = height * width - record["nodata_px"]
    if scored is None:
        return MapFigures(mapped_px, record["road_px"])
    subset = "test" if scored.subsets["test"]["tiles"] else "all"
    g_iou = scored.subsets[subset]["g_iou"]
    return MapFigures(mapped_px, record["road_px"], g_iou if math.isfinite(g_iou) else None, scored.on.basis)


def judge(gate: GateSpec, new: MapFigures, published: MapFigures | None, reference: Reference | None, dumps: Dumps) -> Verdict:
    """Compare a candidate with the published map, and with the best since a person last released one.

    Args:
        gate: The thresholds.
        new: The candidate.
        published: The published map; None where nothing was published yet: then everything passes.
        reference: What was stored with the published map; None where nothing was.
        dumps: What the candidate is made of.
    """
    if published is None:
        return Verdict(())
    reference = reference or next_reference(published, None)
    reasons = [*_g_iou(gate, new, published, reference), *_coverage(gate, new, published, reference),
               *_road(gate, new, published, reference), *_rejected(gate, dumps)]  # fmt: skip
    return Verdict(tuple(reasons), tuple(_notes(new, published)))


def _notes(new: MapFigures, published: MapFigures) -> Iterator[str]:
    if new.basis is None and published.basis is not None:
        yield "the city has no labels any more: g_iou is not compared"
    elif new.basis != published.basis:
        yield "the published map was not scored on these labels and test tiles: g_iou is not compared"
    elif published.g_iou is None and new.basis is not None:
        yield "the g_iou of the published map is no number: it is not compared"


def _g_iou(gate: GateSpec, new: MapFigures, published: MapFigures, reference: Reference) -> Iterator[str]:
    if new.basis is None or new.basis != published.basis or published.g_iou is None:
        return
    if new.g_iou is None:
        if gate.g_iou_drop is not None or gate.g_iou_drift is not None:
            yield f"g_iou cannot be measured; it was {published.g_iou:.3f}"
        return
    drop = published.g_iou - new.g_iou
    best = reference.g_iou if reference.basis == new.basis else None
    if gate.g_iou_drop is not None and drop > gate.g_iou_drop:
        yield f"g_iou on the test tiles fell from {published.g_iou:.3f} to {new.g_iou:.3f}, by more than {gate.g_iou_drop:g}"
    elif gate.g_iou_drift is not None and best is not None and best - new.g_iou > gate.g_iou_drift:
        yield f"g_iou on the test tiles drifted from {best:.3f} to {new.g_iou:.3f}, by more than {gate.g_iou_drift:g}"


def _coverage(gate: GateSpec, new: MapFigures, published: MapFigures, reference: Reference) -> Iterator[str]:
    for verb, before_px, limit in (
        ("shrank", published.mapped_px, gate.coverage_drop),
        ("drifted", reference.mapped_px, gate.coverage_drift),
    ):
        if limit is not None and before_px and 1 - new.mapped_px / before_px > limit:
            yield f"mapped area {verb} from {before_px:,} to {new.mapped_px:,} pixels, by more than {limit:.0%} of it"
            return


def _road(gate: GateSpec, new: MapFigures, published: MapFigures, reference: Reference) -> Iterator[str]:
    for verb, before, limit in (
        ("went", published.road_share, gate.road_change),
        ("drifted", reference.road_share, gate.road_drift),
    ):
        low, high = sorted((before, new.road_share))
        if limit is not None and before > 0 and 1 - low / high > limit:
            line = f"road {verb} from {before:.2%} to {new.road_share:.2%} of the mapped area"
            yield f"{line}, by more than {limit:.0%} of the larger"
            return


def _rejected(gate: GateSpec, dumps: Dumps) -> Iterator[str]:
    usual = [_share(d) for d in dumps.published if d["rows"]]
    if gate.rejected_rise is None or not usual:
        return
    mean = sum(usual) / len(usual)
    for dump in dumps.new:
        if dump["rows"] and _share(dump) - mean > gate.rejected_rise:
            yield f"dump {dump['dump']} lost {_share(dump):.1%} of its rows, those of the published map {mean:.1%}"


def _share(dump: LedgerEntry) -> float:
    return float(sum(dump["rejected"].values()) / dump["rows"])


def next_reference(new: MapFigures, reference: Reference | None) -> Reference:
    """The reference once a map is published.

    Args:
        new: That map.
        reference: The one before; None where a person released the map, or there was none: it starts again.
    """
    if reference is None:
        return Reference(new.mapped_px, new.road_share, new.g_iou, new.basis)
    best = replace(reference, mapped_px=max(reference.mapped_px, new.mapped_px))
    if new.g_iou is None:
        return best
    if reference.basis == new.basis and reference.g_iou is not None:
        return replace(best, g_iou=max(reference.g_iou, new.g_iou))
    return replace(best, g_iou=new.g_iou, basis=new.basis)


def scores_to_store(scored: MapScores) -> dict[str, Any]:
    """Scores as the record of their map keeps them; None where they are no numbers."""
    subsets = {name: {k: v if math.isfinite(v) else None for k, v in by.items()} for name, by in scored.subsets.items()}
    return {"subsets": subsets, "on": asdict(scored.on)}


def stored_scores(record: Mapping[str, Any]) -> MapScores | None:
    """The scores in the record of a map; None where it was published without."""
    stored = record.get("scores")
    if stored is None:
        return None
    subsets = {name: {k: math.nan if v is None else v for k, v in by.items()} for name, by in stored["subsets"].items()}
    return MapScores(subsets, ScoredOn(**stored["on"]))


def stored_reference(record: Mapping[str, Any]) -> Reference | None:
    """The reference in the record of a published map; None where an earlier version published it."""
    stored = record.get("gate")
    return None if stored is None else Reference(**stored["reference"])
