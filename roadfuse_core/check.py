"""A city file against its data: everything that can be known before work begins; nothing is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from roadfuse_core.cubes import FIXED_POINT, find_new, ledger, other_settings, require_same_cube, sift, split_off_young
from roadfuse_core.errors import ConfigError, DataError, RoadFuseError, printable
from roadfuse_core.grid import Grid, fit_projection, ground_metres
from roadfuse_core.imagery import ImageryReader, RasterKey, find_imagery
from roadfuse_core.inference import choose_weights, load_predictor, read_facts, require_target, resolve_weights
from roadfuse_core.labels import open_map
from roadfuse_core.points import (
    Part,
    Reason,
    Rows,
    SourceFile,
    arrays_of,
    check_columns,
    count_suspects,
    describe_suspects,
    empty_files,
    judge_rows,
    left_out,
    materialise,
    read_rows,
    rolled_over_us,
    shift_datum,
    single_precision_step,
)
from roadfuse_core.settings import City, ImagerySpec, InvalidCityError, MapSpec

__all__ = ["check_city", "check_refresh"]

SAMPLE_ROWS = 50_000
DAY_US = 86_400_000_000
# A metre of the grid's CRS that differs from one on the ground by more is mentioned; one beyond the other bound is refused.
TRUE_METRE = 0.02
MIN_METRE = 0.1


def check_city(city: City) -> list[str]:
    """Validate a city against its files.

    Args:
        city: A loaded city file.

    Returns:
        One line for each thing found, in words for people.

    Raises:
        InvalidCityError: One line for each thing that is wrong, with key, value and fix.
    """
    return _collect(city, (_check_grid, _check_workspace, _check_points, _check_imagery, _check_maps, _check_model))


def check_refresh(city: City) -> list[str]:
    """Validate a city before a refresh: as `check_city`, but points that the ingest will look at are left to it.

    Args:
        city: A loaded city file.

    Returns:
        One line for each thing found, in words for people.

    Raises:
        InvalidCityError: One line for each thing that is wrong, with key, value and fix.
    """
    return _collect(city, (_check_grid, _check_workspace, _check_first_points, _check_imagery, _check_maps, _check_model))


def _collect(city: City, parts: Sequence[Callable[[City], list[str]]]) -> list[str]:
    found: list[str] = []
    wrong: list[str] = []
    for part in parts:
        try:
            found += part(city)
        except RoadFuseError as error:
            wrong += str(error).splitlines()
    if wrong:
        raise InvalidCityError("\n".join(dict.fromkeys(wrong)))
    return found


def _check_grid(city: City) -> list[str]:
    grid = city.make_grid()
    height, width = grid.shape
    km2 = height * width * grid.resolution_m**2 / 1e6
    across, down = ground_metres(grid.crs, grid)
    if not (MIN_METRE < across < 1 / MIN_METRE and MIN_METRE < down < 1 / MIN_METRE):
        raise ConfigError("grid.crs", grid.crs, f"has metres that are {across:.3g} m on the ground here",
                          "leave it out, and the UTM zone is taken")  # fmt: skip
    bound = fit_projection(grid).error_px
    found = [f"grid: {grid.crs}, {width} × {height} px of {grid.resolution_m} m, {grid.n_tiles} tiles, {km2:.1f} km²; "
             f"points are placed within {bound:.4f} px of PROJ"]  # fmt: skip
    if abs(across - 1) > TRUE_METRE or abs(down - 1) > TRUE_METRE:
        true_km2 = km2 * across * down
        found.append(f"grid: a metre of {grid.crs} is {across:.2f} m on the ground here, and the city {true_km2:.1f} km²; "
                     "leave grid.crs out for a UTM zone, whose metres are true")  # fmt: skip
    return found


def _check_workspace(city: City) -> list[str]:
    """Whether the workspace can be made where it shall be; nothing is."""
    path = city.workspace_path
    try:
        above = next(p for p in (path, *path.parents) if p.exists())
        room, folder = os.statvfs(above), above.is_dir()
    except (OSError, ValueError) as error:
        raise ConfigError("workspace", city.workspace, f"cannot be a folder ({error})", "give the path of a folder") from error
    if not folder:
        raise ConfigError("workspace", city.workspace, f"is no folder: {above} is a file", "give the path of a folder")
    if room.f_blocks == 0 or room.f_flag & os.ST_RDONLY or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError("workspace", city.workspace, f"cannot be written: {above} takes no files", "give a folder of yours")
    return []


def _check_first_points(city: City) -> list[str]:
    """The sources of a city without dumps; otherwise the ingest checks what is new, and many objects are listed once."""
    dumps = len(ledger(city)) if city.points else 0
    if not dumps:
        return _check_points(city)
    return [f"points: {dumps} dumps in the ledger; the ingest checks what is new", *_check_cube(city)]


def _check_cube(city: City) -> list[str]:
    """Whether the city file still fits the cube, and the dumps that were read with other settings."""
    require_same_cube(city)
    return [f"points: {line}" for line in other_settings(city)]


def _check_points(city: City) -> list[str]:
    if city.points is None:
        return ["points: none; the map comes from imagery alone"]
    grid = city.make_grid()
    fit_projection(grid, city.points.crs)
    known, found_files = find_new(city)
    if not known and not found_files:
        return ["points: the sources match no file now; what they once matched is in the ledger", *_check_cube(city)]
    settled, left = split_off_young(city, found_files)
    counted, damaged = sift(settled, lambda some: check_columns(city, some))
    if damaged and not counted and not known:
        check_columns(city, settled)
    files, rows = [f for f, _ in counted], sum(n for _, n in counted)
    empty = empty_files(city, files)
    if not known and files and len(empty) == len(files):
        raise ConfigError("points.sources", list(city.points.sources), "hold no rows", "point at files with data")
    said = [f"points: {len(known) + len(files)} files", f"{len(known)} of them in the ledger" if known else ""]
    new = "new " if known else ""
    exact = all(f.is_parquet for f in files)
    said.append(f"{rows:,} rows in {new}Parquet" if rows and exact else f"about {rows:,} {new}rows" if rows else "")
    found = [", ".join(text for text in said if text)]
    found += [f"points: {f.shown} is empty" for f in empty[:5]]
    found += [f"{s.reason} (left out)" for s in (*left, *damaged)]
    if others := left_out(city):
        names = ", ".join(printable(Path(path).name) for path in others[:5]) + (", …" if len(others) > 5 else "")
        found.append(f"points: {len(others)} other files below the sources are not read: {names}")
    if (step := single_precision_step(city, files)) > 0.5:
        found.append(f"points: positions are stored in 32 bits and step by {step:.1f} px here; store them in 64 bits")
    found += _check_cube(city)
    if known:  # the settings fitted those, and a new file may lie elsewhere
        return found
    full = [f for f in files if f not in empty]
    return found + (_check_first_readable(city, grid, full) if full else [])


def _check_first_readable(city: City, grid: Grid, files: list[SourceFile]) -> list[str]:
    """Place the first rows of the first file that can be read."""
    for file in files[:-1]:
        try:
            return _check_sample(city, grid, file)
        except DataError:  # the ingest leaves it out and says so
            continue
    return _check_sample(city, grid, files[-1])


def _check_sample(city: City, grid: Grid, file: SourceFile) -> list[str]:
    """Place the first rows of a file; a city whose points lie elsewhere is found before they are all read."""
    assert city.points is not None
    columns = city.points.columns
    with tempfile.TemporaryDirectory() as scratch:
        part = Part(tuple(materialise([file], Path(scratch))))
        rows = shift_datum(read_rows(city.points, part, Path(scratch), SAMPLE_ROWS), city.points.datum)
    reason = judge_rows(rows, city.points.clean, grid, fit_projection(grid, city.points.crs)).reason
    share = {r: float(np.mean(reason == r)) for r in Reason}
    if share[Reason.SWAPPED] > share[Reason.KEPT]:
        raise ConfigError("points.columns", {"lon": columns.lon, "lat": columns.lat},
                          "give positions in the city only when exchanged", "exchange lon and lat")  # fmt: skip
    if share[Reason.NOT_FINITE] > 0.5:
        problem = (
            f"and {columns.lat!r} hold no pair of numbers in {share[Reason.NOT_FINITE]:.0%} of the first rows of {file.shown}"
        )
        raise ConfigError(
            "points.columns.lon", columns.lon, problem, "name columns of decimal degrees, or of metres with points.crs"
        )
    if share[Reason.TIME] > 0.5:
        problem = f"holds no usable time in {share[Reason.TIME]:.0%} of the first rows of {file.shown}"
        raise ConfigError("points.columns.time", columns.time, problem,
                          "name another column, or set points.time_unit or points.clean.time_range")  # fmt: skip
    if share[Reason.KEPT] == 0:
        raise ConfigError(
            "points.sources", file.shown, "has no position inside grid.bounds in its first rows",
            _why_outside(city, grid, rows),
        )  # fmt: skip
    kept = rows.time_us[reason == Reason.KEPT] if len(rows.time_us) else rows.time_us
    warned = describe_suspects(*count_suspects(kept, rolled_over_us()), len(kept))
    if len(np.unique(kept)) > 1 and len(np.unique(kept % DAY_US)) == 1:
        warned.append("all times are of one time of the day: if it is in a column of its own, write both as one")
    name = printable(Path(file.member or file.path).name)
    return [f"points: {share[Reason.KEPT]:.1%} of the first {len(reason):,} rows of {name} fall on the grid",
            *(f"points: {line}" for line in warned)]  # fmt: skip


def _why_outside(city: City, grid: Grid, rows: Rows) -> str:
    """What to do about positions that all lie elsewhere; degrees that were written as whole numbers are known by their size."""
    assert city.points is not None
    box = fit_projection(grid, city.points.crs).box
    for digits in range(5, 10):
        x, y = rows.x / 10**digits, rows.y / 10**digits
        if np.any((box[0] <= x) & (x < box[2]) & (box[1] <= y) & (y < box[3])):
            return f"divide them by 10^{digits}: they look like degrees in whole numbers"
    return "correct grid.bounds, points.columns, points.crs or points.datum"


def _check_imagery(city: City) -> list[str]:
    found = [] if city.imagery else ["imagery: none; the map comes from trajectories alone"]
    rasters: list[tuple[RasterKey, ImagerySpec | None]] = [("imagery", city.imagery), ("lidar", city.lidar)]
    for key, spec in rasters:
        if spec:
            paths = find_imagery(city, key)
            if not ImageryReader(spec, paths, city.make_grid(), key).covers():
                raise ConfigError(
                    f"{key}.sources", list(spec.sources), "lies outside grid.bounds", "correct grid.bounds or the files"
                )
            found.append(f"{key}: {len(paths)} files")
    return found


def _maps(city: City) -> Iterator[tuple[str, MapSpec]]:
    for name, spec in city.labels.items():
        yield f"labels.{name}", spec
    if city.existing_map:
        yield "existing_map", city.existing_map


def _check_maps(city: City) -> list[str]:
    found = []
    for key, spec in _maps(city):
        labels = open_map(city, spec, key, city.make_grid())
        if not labels.covers():
            raise ConfigError(f"{key}.path", spec.path, "lies outside grid.bounds", "correct grid.bounds or the file")
        found.append(f"{key}: readable, and inside the grid" + (f"; {labels.note}" if labels.note else ""))
    return found


def _check_model(city: City) -> list[str]:
    ref = resolve_weights(choose_weights(city), city.root).model_copy(update={"turns": city.model.turns})
    predictor = load_predictor(ref, city.grid.resolution_m)
    require_target(city, read_facts(ref, city.grid.resolution_m))
    if city.points is not None:
        held = arrays_of(city.points)
        for layer in predictor.layers:
            lacking = [a for a in layer.arrays if a not in held]
            if lacking:
                raise ConfigError(
                    "model.weights",
                    city.model.weights,
                    f"needs {', '.join(lacking)}",
                    "name the columns in points.columns",
                )
    elif "image" not in predictor.rasters:
        raise ConfigError("model.weights", city.model.weights, "needs trajectories", "add points or use other weights")
    if not predictor.layers and city.imagery is None:
        raise ConfigError("model.weights", city.model.weights, "needs imagery", "add imagery or use other weights")
    found = [f"lidar: {ref.path.name} does not take it"] if city.lidar and "lidar" not in predictor.rasters else []
    arrays = FIXED_POINT.keys() & {a for layer in predictor.layers for a in layer.arrays}
    return [*found, f"model: {ref.path.name}, {len(arrays)} cube arrays"]
