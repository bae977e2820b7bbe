"""Windows and predictions side by side, for people."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from roadfuse_core.training._augment import Prepared, prepare
from roadfuse_core.training._ground import Ground
from roadfuse_core.training._recipe import View
from roadfuse_core.training._score import Damage
from roadfuse_core.training._windows import StillWindows, collate

__all__ = ["panel", "to_png", "window_inputs"]

PANEL_PX, TITLE_PX, GAP_PX = 256, 22, 10
COLUMNS = 4
Picture = NDArray[np.uint8]


def window_inputs(view: View, grounds: Sequence[Ground], damage: Damage) -> Prepared:
    """The test tile with the most road, as the network sees it."""
    road = [r for g in grounds for r in g.road]
    still = StillWindows(view, grounds)
    number = next(k for k, place in enumerate(still.places) if place[1] == int(np.argmax(road)))
    window = still[number]
    window.change |= {k: np.asarray(v, np.float32) for k, v in damage.change(np.random.default_rng(0), view.window_px).items()}
    return prepare(collate([window]), view)


def panel(name: str, made: Prepared, logits: Tensor) -> tuple[str, Picture]:
    """A prediction: hits white, false alarms red, misses blue, and its IoU."""
    road, truth = (logits[0, 0] > 0).numpy(), (made.labels[0, 0] > 0).numpy()
    out = np.zeros((*road.shape, 3), np.uint8)
    out[road & truth], out[road & ~truth], out[~road & truth] = (255, 255, 255), (230, 60, 50), (60, 110, 230)
    iou = (road & truth).sum() / max(1, (road | truth).sum())
    return f"{name}  {iou:.3f}", out


def to_png(panels: list[tuple[str, Picture]], made: Prepared) -> str:
    """Evidence, truth and predictions on one sheet; PNG as base64."""
    shown = []
    if "image" in made.inputs:
        rgb = (made.inputs["image"][0] * 0.25 + 0.5).clamp(0, 1).permute(1, 2, 0)
        shown.append(("image", (rgb * 255).byte().numpy()))
    if "lidar" in made.inputs:
        grey = (made.inputs["lidar"][0, 0] * 0.25 + 0.5).clamp(0, 1)
        shown.append(("lidar", (grey * 255).byte()[..., None].expand(-1, -1, 3).numpy()))
    if "gps" in made.inputs:
        layer = made.inputs["gps"][0, 0]
        grey = (layer / layer.max().clamp(min=1e-6)).sqrt()
        shown.append(("points", (grey * 255).byte()[..., None].expand(-1, -1, 3).numpy()))
    truth = (made.labels[0, 0] * 255).byte()[..., None].expand(-1, -1, 3).numpy()
    every = [*shown, ("truth", truth), *panels]
    scale = -(-PANEL_PX // truth.shape[0])
    px = scale * truth.shape[0]
    rows = -(-len(every) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (px + GAP_PX), rows * (px + TITLE_PX + GAP_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for k, (title, picture) in enumerate(every):
        x, y = k % COLUMNS * (px + GAP_PX), k // COLUMNS * (px + TITLE_PX + GAP_PX)
        draw.text((x + 2, y + 2), title, fill="black", font=font)
        sheet.paste(Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1)), (x, y + TITLE_PX))
    held = io.BytesIO()
    sheet.save(held, "PNG", optimize=True)
    return base64.b64encode(held.getvalue()).decode()
