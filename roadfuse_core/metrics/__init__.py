"""Scores: confusion counts per tile, and what a city's map is worth as a whole."""

from roadfuse_core.metrics._city import NEAR_M, CityScores, score_city, tune_kde
from roadfuse_core.metrics._confusion import Confusion, Scores, confusion, scores
from roadfuse_core.metrics._gate import Verdict, append_history, judge, read_history, write_metrics

__all__ = [
    "NEAR_M",
    "CityScores",
    "Confusion",
    "Scores",
    "Verdict",
    "append_history",
    "confusion",
    "judge",
    "read_history",
    "score_city",
    "scores",
    "tune_kde",
    "write_metrics",
]
