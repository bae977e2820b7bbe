"""How wide lines are drawn: by a column of widths, by lanes, or all alike."""

from __future__ import annotations

import re

import geopandas as gpd
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from roadfuse_core.errors import ConfigError
from roadfuse_core.settings import MapSpec

__all__ = ["lanes_of", "widths_of"]

# Lanes by class where a way does not say (PP-LinkNet, as released).
WIDE = ("motorway", "trunk", "primary", "secondary", "tertiary")
LANES = {kind: 1.5 for k in WIDE for kind in (k, f"{k}_link")} | {"track": 0.5, "living_street": 0.5}
MAX_WIDTH_M = 100.0
MAX_LANES = 30.0
METRES = {"": 1.0, "m": 1.0, "metre": 1.0, "metres": 1.0, "meter": 1.0, "meters": 1.0, "cm": 0.01, "km": 1000.0,
          "ft": 0.3048, "feet": 0.3048, "foot": 0.3048, "'": 0.3048, "in": 0.0254, '"': 0.0254, "yd": 0.9144}  # fmt: skip
NUMBER = r"[+-]?\d+(?:[.,]\d+)?(?:e[+-]?\d+)?"
QUANTITY = re.compile(rf"~?\s*({NUMBER})\s*([a-z]*|'|\")\.?(?:\s*({NUMBER})\s*(in|\"))?", re.IGNORECASE)


def widths_of(lines: gpd.GeoDataFrame, spec: MapSpec, key: str, path: str) -> tuple[NDArray[np.float64], int]:
    """Widths of lines in metres, and how many of them the column does not give.

    A column holds numbers, or text as OpenStreetMap has it: `8`, `8 m`, `26'3"`, `7,5`, and `8;9` or a list, of which the mean
    is taken. What is empty, is no number, or is not above zero (databases write 0 for unknown) becomes `width_m`.

    Args:
        lines: With the column.
        spec: The setting.
        key: Its dotted name, for messages.
        path: For messages.

    Raises:
        ConfigError: The column is missing, holds no width at all, or one above 100 m.
    """
    if spec.width is None:
        default = np.full(len(lines), spec.width_m)
        return (default if spec.lane_m is None else lanes_of(lines, key, path) * spec.lane_m), 0
    if spec.width not in lines.columns:
        columns = ", ".join(lines.attrs.get("columns", [c for c in lines.columns if c != "geometry"]))
        raise ConfigError(f"{key}.width", spec.width, f"is not a column of {path}", f"it has: {columns}")
    of_lines = lines.geom_type.isin(("LineString", "MultiLineString")).to_numpy()
    widths = np.array([_metres(value) for value in lines[spec.width]])
    usable = np.nan_to_num(widths, nan=0.0) > 0
    if (wide := widths[of_lines & usable & (widths > MAX_WIDTH_M)]).size:
        raise ConfigError(f"{key}.width", spec.width, f"holds {wide.size} widths above {MAX_WIDTH_M:g} m, such as {wide[0]:g}",
                          f"correct them in {path}; widths are metres")  # fmt: skip
    if of_lines.any() and not (of_lines & usable).any():
        raise ConfigError(
            f"{key}.width", spec.width, f"holds no width above zero in {path}", "name another column, or leave it out"
        )
    return np.where(usable, widths, spec.width_m), int((of_lines & ~usable).sum())


def lanes_of(ways: gpd.GeoDataFrame, key: str, path: str) -> NDArray[np.float64]:
    """Lanes of OpenStreetMap's ways: as tagged, or by class (1.5, 1 or one half).

    Args:
        ways: With a column `highway`, and `lanes`, or `other_tags` as GDAL reads them from PBF.
        key: For messages.
        path: For messages.

    Returns:
        (n,) lanes, more than 0.

    Raises:
        ConfigError: There is no column `highway`.
    """
    if "highway" not in ways.columns:
        raise ConfigError(
            f"{key}.lane_m", path, "has no column `highway`", "leave lane_m out, or give an extract of OpenStreetMap"
        )
    lanes = pd.Series(np.nan, ways.index)
    if "lanes" in ways.columns:
        lanes = pd.Series([_number(value) for value in ways["lanes"]], ways.index)
    if "other_tags" in ways.columns:
        tagged = ways["other_tags"].astype(str).str.extract(r'"lanes"=>"([^"]*)"')[0]
        lanes = lanes.fillna(pd.Series([_number(value) for value in tagged], ways.index))
    by_class = ways["highway"].map(str).str.extract(r"([a-z_]+)")[0].map(LANES).fillna(1.0)
    return lanes.where((lanes > 0) & (lanes <= MAX_LANES), by_class).to_numpy(float)


def _values(value: object) -> list[str]:
    """One or several values of a cell: `8;9`, `['8', '9']`, an array."""
    if isinstance(value, list | tuple | np.ndarray):
        return [str(v) for v in value]
    text = "" if value is None else str(value).strip()
    if text.startswith("["):
        return [part.strip(" '\"") for part in text.strip("[]").split(",")]
    return re.split(r"[;|]|(?<=\d)\s*-\s*(?=\d)", text)


def _number(value: object) -> float:
    found = [float(text) for text in map(str.strip, _values(value)) if re.fullmatch(r"\d+(\.\d+)?", text)]
    return float(np.mean(found)) if found else np.nan


def _metres(value: object) -> float:
    """Metres of a cell; NaN where it holds none."""
    if isinstance(value, int | float | np.number):
        return float(value)
    found = [_length_m(text) for text in _values(value)]
    found = [one for one in found if not np.isnan(one)]
    return float(np.mean(found)) if found else np.nan


def _length_m(text: str) -> float:
    if text.strip().lower() in ("inf", "+inf", "infinity"):
        return np.inf
    match = QUANTITY.fullmatch(text.strip())
    if match is None or match[2].lower() not in METRES:
        return np.nan
    length_m = float(match[1].replace(",", ".")) * METRES[match[2].lower()]
    return length_m + (float(match[3].replace(",", ".")) * METRES["in"] if match[3] else 0.0)
