"""Laws of a dump: its cube does not depend on files, formats, types of ids, or slices; without vehicles, nor on dumps."""

import gzip
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from roadfuse_core.cubes import CubeReader, _plan, cubes_path, ingest, ledger
from roadfuse_core.settings import City, load_city

BOX = (13.0, 47.0, 13.01, 47.01)
COLUMNS = {"vehicle": "vid", "lon": "lon", "lat": "lat", "time": "t", "speed": "sp", "bearing": "br"}
NAMES = ("count", "speed_sum", "speed_count", "sin_sum", "cos_sum", "bearing_count", "interval_sum", "interval_count")
IDS = {
    "whole": lambda v: v, "text": lambda v: v.astype("string"), "double": lambda v: v.astype("Float64"),
    "double as text": lambda v: v.astype("Float64").astype("string"),
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """How a file of a dump is written."""

    suffix: str
    ids: str
    share: float


def dump(seed: int, vehicles: int) -> pd.DataFrame:
    """203 rows of vehicles whose ids, speeds and bearings are missing here and there; some repeated, some spoilt."""
    rng = np.random.default_rng(seed)
    rows = 197
    vehicle = pd.Series(np.sort(rng.integers(0, vehicles, rows)) + 7, dtype="Int64").mask(rng.random(rows) < 0.2)
    lon = 13.005 + 0.004 * np.sin(np.arange(rows) / 40)
    lon[rng.random(rows) < 0.04] += 0.003
    lat = 47.002 + 0.00001 * np.arange(rows)
    lat[rng.random(rows) < 0.03] = np.nan
    stamps = pd.Timestamp("2026-03-31 23:58", tz="UTC") + pd.to_timedelta(np.arange(rows) * 2, unit="s")
    frame = pd.DataFrame({
        "vid": vehicle, "lon": lon.round(7), "lat": lat.round(7), "t": stamps, "sp": rng.uniform(0, 90, rows).round(1),
        "br": rng.uniform(0, 360, rows).round(1),
    })  # fmt: skip
    frame.loc[rng.random(rows) < 0.1, "sp"] = np.nan
    frame.loc[rng.random(rows) < 0.1, "br"] = np.nan
    return pd.concat([frame, frame.iloc[::35]]).sample(frac=1, random_state=seed)


def city_of(folder: Path, columns: dict[str, str]) -> City:
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": list(BOX), "resolution_m": 4.0, "tile_px": 256},
        "points": {"sources": ["*"], "columns": columns}, "cluster": {"workers": 1, "memory_gib": 2},
    }  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


def write(frame: pd.DataFrame, files: list[File], folder: Path) -> list[str]:
    """The rows by shares in files of their own; a file may get none. Their names as sources."""
    cuts = np.cumsum([f.share for f in files]) / max(1e-9, sum(f.share for f in files)) * len(frame)
    edges = [0, *np.rint(cuts[:-1]).astype(int), len(frame)]
    names = list[str]()
    for number, (file, start, stop) in enumerate(zip(files, edges, edges[1:], strict=False)):
        part = frame.iloc[start:stop]
        part = part.assign(vid=IDS[file.ids](part.vid))
        names.append(f"{number}-{start}{file.suffix}")
        path = folder / names[-1]
        if file.suffix == ".parquet":
            part.to_parquet(path)
        else:
            text = part.to_csv(index=False, date_format="%Y-%m-%dT%H:%M:%S.%fZ").encode()
            path.write_bytes(gzip.compress(text) if file.suffix == ".csv.gz" else text)
    return names


def outcome(city: City) -> dict[str, Any]:
    """What all dumps of a city hold together."""
    cube, shape = CubeReader(cubes_path(city)), city.make_grid().shape
    sums = {name: cube.window(name, 0, 0, *shape) for name in NAMES if name in cube.arrays}
    found: dict[str, Any] = {name: (np.argwhere(s).tolist(), s[s != 0].tolist()) for name, s in sums.items()}
    entries = list(ledger(city).values())
    found["rows"] = sum(e["rows"] for e in entries)
    found["rejected"] = dict(sum((Counter(e["rejected"]) for e in entries), Counter[str]()))
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """The outcome of a dump, by its seed, vehicles and columns, in one file of Parquet and one slice."""

    @lru_cache(maxsize=64)
    def outcome_of(seed: int, vehicles: int, columns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("reference")
        city = city_of(folder, dict(columns))
        ingest(city, write(dump(seed, vehicles), [File(".parquet", "whole", 1)], folder))
        return outcome(city)

    return outcome_of


FILES = st.lists(
    st.builds(File, st.sampled_from([".parquet", ".csv", ".csv.gz"]), st.sampled_from(sorted(IDS)), st.sampled_from([0, 1, 3])),
    min_size=1, max_size=5,
)  # fmt: skip
# Every example is an ingest or more: a failing one is shown as it is, not made smaller.
PHASES = (Phase.explicit, Phase.generate)
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def slice_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(_plan, "ROWS_PER_SLICE", rows)
    monkeypatch.setattr(_plan, "LEAST_ROWS_PER_SLICE", rows)


@given(st.integers(0, 2), st.sampled_from([1, 2, 11]), FILES, st.sampled_from([30, 90, 10_000]))
@settings(max_examples=6, phases=PHASES, suppress_health_check=HEALTH)
def test_vehicle_rules_are_the_same_for_any_split_of_a_dump(
    tmp_path_factory, reference, monkeypatch, seed, vehicles, files, rows
):
    expected = reference(seed, vehicles, tuple(COLUMNS.items()))
    assert {"duplicate", "teleport", "not_finite"} <= set(expected["rejected"])
    folder = tmp_path_factory.mktemp("split")
    with monkeypatch.context() as patch:
        slice_rows(patch, rows)
        city = city_of(folder, COLUMNS)
        ingest(city, write(dump(seed, vehicles), files, folder))
        assert outcome(city) == expected


@given(st.integers(0, 2), FILES, st.integers(1, 3), st.sampled_from([30, 90, 10_000]))
@settings(max_examples=6, phases=PHASES, suppress_health_check=HEALTH)
def test_row_rules_are_the_same_for_any_split_into_files_slices_and_dumps(
    tmp_path_factory, reference, monkeypatch, seed, files, dumps, rows
):
    columns = {key: column for key, column in COLUMNS.items() if key != "vehicle"}
    expected = reference(seed, 5, tuple(columns.items()))
    folder = tmp_path_factory.mktemp("split")
    with monkeypatch.context() as patch:
        slice_rows(patch, rows)
        city = city_of(folder, columns)
        names = write(dump(seed, 5), files, folder)
        for k in range(dumps):
            if names[k::dumps]:
                ingest(city, names[k::dumps])
        assert outcome(city) == expected
