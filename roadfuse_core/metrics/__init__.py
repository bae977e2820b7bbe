"""Scores: confusion counts per tile, and what a city's map is worth as a whole."""

from roadfuse_core.metrics._city import (
    NEAR_M,
    CityScores,
    MapScores,
    ScoredOn,
    current_scores,
    describe_tiles,
    read_scores,
    rescore,
    score_city,
)
from roadfuse_core.metrics._confusion import Confusion, Scores, confusion, scores
from roadfuse_core.metrics._gate import (
    Dumps,
    MapFigures,
    Reference,
    Verdict,
    figures_of,
    judge,
    next_reference,
    scores_to_store,
    stored_reference,
    stored_scores,
)
from roadfuse_core.metrics._history import HistoryEntry, append_history, read_history, write_metrics
from roadfuse_core.metrics._tune import tune_kde

__all__ = [
    "NEAR_M",
    "CityScores",
    "Confusion",
    "Dumps",
    "HistoryEntry",
    "MapFigures",
    "MapScores",
    "Reference",
    "ScoredOn",
    "Scores",
    "Verdict",
    "append_history",
    "confusion",
    "current_scores",
    "describe_tiles",
    "figures_of",
    "judge",
    "next_reference",
    "read_history",
    "read_scores",
    "rescore",
    "score_city",
    "scores",
    "scores_to_store",
    "stored_reference",
    "stored_scores",
    "tune_kde",
    "write_metrics",
]
