"""Training as a flow, for those who start it in the UI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from tasks import stages

__all__ = ["train"]


@flow(name="train", flow_run_name="train {recipe_file}")
def train(
    recipe_file: Annotated[Path, Field(title="Recipe", description="Path of recipe.yaml, as the worker sees it.")],
    out: Annotated[Path | None, Field(description="Folder for the run; by default runs/NAME beside the recipe.")] = None,
) -> dict[str, Any]:
    """Train a network by a recipe; a run that was stopped goes on.

    Args:
        recipe_file: The recipe.
        out: Folder for the run.

    Returns:
        Where the checkpoint lies, and its validation.
    """
    return stages.train(recipe_file, out)
