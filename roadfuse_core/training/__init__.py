"""Training: windows, augmentation, recipes."""

from roadfuse_core.training._compact import CompactRecipe, bce_dice, train_compact
from roadfuse_core.training._samples import TrainingCity, draw_city, draw_knobs, window_batch

__all__ = ["CompactRecipe", "TrainingCity", "bce_dice", "draw_city", "draw_knobs", "train_compact", "window_batch"]
