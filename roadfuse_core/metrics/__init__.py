"""Scores: confusion counts per tile, and what a city's map is worth as a whole."""

from roadfuse_core.metrics._city import (
    NEAR_M,
    CityScores,
    MapScores,
    ScoredOn,
    current_scores,
    describe_tiles,
    read_scores,
    score_city,
)
from roadfuse_core.metrics._confusion import Confusion, Scores, confusion, scores
from roadfuse_core.metrics._gate import Verdict, append_history, judge, read_history, write_metrics
from roadfuse_core.metrics._tune import tune_kde

__all__ = [
    "NEAR_M",
    "CityScores",
    "Confusion",
    "MapScores",
    "ScoredOn",
    "Scores",
    "Verdict",
    "append_history",
    "confusion",
    "current_scores",
    "describe_tiles",
    "judge",
    "read_history",
    "read_scores",
    "score_city",
    "scores",
    "tune_kde",
    "write_metrics",
]
