"""Training: recipes, windows, augmentation on the device, Lightning's loop, comparisons, robustness."""

from roadfuse_core.training._augment import Prepared, points_of, prepare, render_points
from roadfuse_core.training._compare import (
    Comparison,
    compare,
    measure_speeds,
    paired,
    paired_differences,
    plan_runs,
    tabulate,
)
from roadfuse_core.training._estimate import estimate_seconds, made_up_batch
from roadfuse_core.training._fit import DivergedError, Trained, TrainingStoppedError, check_recipe, train
from roadfuse_core.training._ground import UNKNOWN, Cells, Ground, arrays_of_layers, lay_ground
from roadfuse_core.training._recipe import InvalidRecipeError, Recipe, View, load_recipe, parse_vary
from roadfuse_core.training._score import SUITE, Damage, Scored, score_network
from roadfuse_core.training._splits import Splits, lay_split, split_recipe
from roadfuse_core.training._suite import run_suite, write_curves
from roadfuse_core.training._windows import Batch, Draws, StillWindows, TrainingWindows, Window, WindowOrder, collate

__all__ = [
    "SUITE",
    "UNKNOWN",
    "Batch",
    "Cells",
    "Comparison",
    "Damage",
    "DivergedError",
    "Draws",
    "Ground",
    "InvalidRecipeError",
    "Prepared",
    "Recipe",
    "Scored",
    "Splits",
    "StillWindows",
    "Trained",
    "TrainingStoppedError",
    "TrainingWindows",
    "View",
    "Window",
    "WindowOrder",
    "arrays_of_layers",
    "check_recipe",
    "collate",
    "compare",
    "estimate_seconds",
    "lay_ground",
    "lay_split",
    "load_recipe",
    "made_up_batch",
    "measure_speeds",
    "paired",
    "paired_differences",
    "parse_vary",
    "plan_runs",
    "points_of",
    "prepare",
    "render_points",
    "run_suite",
    "score_network",
    "split_recipe",
    "tabulate",
    "train",
    "write_curves",
]
