"""Files of any name: each is read once, by its own name, on every way from the sources to the cube and out of it."""

import shutil
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import yaml
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.check import check_city
from roadfuse_core.cubes import CubeReader, cubes_path, files_between, forecast, ingest, ledger, plan_ingest
from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.imagery import find_imagery
from roadfuse_core.settings import City, load_city
from roadfuse_core.wildcards import find_paths

# Pairs of names; read as a pattern the first would match the second.
PAIRS = [
    ("x[1]", "x1"), ("a*", "ab"), ("b?", "bb"), ("c[!d]*", "ce"), ("it's", "its"), ('say "x"', "say x"), ("d e", "de"),
    ("f%20g", "f g"), ("h\ni", "hi"), ("straße", "strasse"), ("車[2]", "車2"), ("j{1,2}", "j1"), ("k]l[", "k]l"), ("m\\[n]", "mn"),
    ("day=1::x", "day=1"), ("~o", "o"),
]  # fmt: skip


def table(rows: int, seed: int) -> pa.Table:
    """Rows of one day of March 2026, of the number that the seed gives."""
    rng = np.random.default_rng(seed)
    stamps = (
        np.datetime64("2026-03-01", "us") + np.timedelta64(seed, "D") + rng.integers(0, 8e10, rows).astype("timedelta64[us]")
    )
    return pa.table(
        {
            "lon": 13 + 0.01 * rng.random(rows),
            "lat": 47 + 0.01 * rng.random(rows),
            "t": stamps,
            "v": [f"{seed}-{k % 40}" for k in range(rows)],
        }
    )


def write(path: Path, rows: int, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table(rows, seed), path)
    else:
        table(rows, seed).to_pandas().to_csv(path, index=False)
    return path


def city(folder: Path, *sources: str, **more) -> City:
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": list(sources) or ["*"], "columns": {"lon": "lon", "lat": "lat", "time": "t"}},
        "model": {"weights": "kde"}, "cluster": {"kind": "local", "workers": 1},
    } | more  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True))
    return load_city(folder / "city.yaml")


def counted(c: City) -> int:
    return int(CubeReader(cubes_path(c)).window("count", 0, 0, *c.make_grid().shape).sum())


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
@pytest.mark.parametrize("vehicle", [False, True])
def test_every_name_is_read_once_whatever_it_looks_like(tmp_path, ending, vehicle):
    """Each file has rows and a time of its own, so that one read for another shows in the sums and the span."""
    c = city(tmp_path, f"dumps/*{ending}")
    if vehicle:
        columns = c.points.columns.model_copy(update={"vehicle": "v"})
        still = c.points.clean.model_copy(update={"teleport_kmh": None})
        c = c.model_copy(update={"points": c.points.model_copy(update={"columns": columns, "clean": still})})
    expected = 0
    for k, name in enumerate(n for pair in PAIRS for n in pair):
        write(tmp_path / "dumps" / f"{name}{ending}", 31 + k, k)
        expected += 31 + k
    entry = ingest(c)
    assert len(entry["files"]) == 2 * len(PAIRS)
    assert (entry["rows"], entry["kept"], counted(c)) == (expected, expected, expected)
    assert ingest(c) is None


def test_a_file_by_its_own_name(tmp_path):
    """The plan and the forecast of one file take that file, not its neighbour; so do check and ingest."""
    c = city(tmp_path)
    for k, name in enumerate(n for pair in PAIRS for n in pair):
        write(tmp_path / f"{name}.csv", 31 + k, k)
    for k, name in enumerate(n for pair in PAIRS for n in pair):
        # A bracket may stand for itself, a star and a question mark never do.
        stars = "*" in name or "?" in name
        wanted = ("".join(f"[{c}]" if c in "*?[" else c for c in name) if stars else name) + ".csv"
        plan = plan_ingest(c, [wanted])
        assert [Path(f["path"]).name for f in plan.files] == [f"{name}.csv"]
        assert forecast(c, plan).sampled == 31 + k
    assert "of the first 31 rows" in " ".join(check_city(city(tmp_path, "x[1].csv")))
    assert ingest(c, ["x[1].csv"])["rows"] == 31


def test_a_wildcard_in_a_name_that_exists_still_is_one(tmp_path):
    c = city(tmp_path)
    for k, name in enumerate(("y*.parquet", "yy.parquet", "y1[2].parquet")):
        write(tmp_path / name, 20 + k, k)
    assert ingest(c, ["y*.parquet"])["rows"] == 63


@pytest.mark.parametrize("folder", ["city [1]", "c*y", "what's %20?\n"])
def test_a_city_in_a_folder_of_any_name(tmp_path, folder):
    for name in (folder, "city 1", "cxy"):
        write(tmp_path / name / "a.parquet", 40, 3)
        with rasterio.open(tmp_path / name / "a.tif", "w", driver="GTiff", width=4, height=4, count=1, dtype="uint8", crs="EPSG:32633",
                           transform=rasterio.Affine(1, 0, 9, 0, -1, 9)) as image:  # fmt: skip
            image.write(np.ones((1, 4, 4), np.uint8))
    c = city(tmp_path / folder, "*.parquet", imagery={"sources": ["*.tif"]})
    assert find_imagery(c) == [str(tmp_path / folder / "a.tif")]
    points_only = c.model_copy(update={"imagery": None})
    check_city(points_only)
    assert [f["path"] for f in ingest(c)["files"]] == [str(tmp_path / folder / "a.parquet")]
    assert counted(c) == 40


def test_what_was_found_is_not_searched_again(tmp_path, monkeypatch):
    """A backfill hands on the files that it chose; one that looks like a pattern of others stays that file."""
    c = city(tmp_path, "*.parquet")
    for k, name in enumerate(("a[1-9].parquet", "a1.parquet", "a2.parquet", "b::c.parquet")):
        write(tmp_path / name, 30 + k, k + 1)
    days = [datetime(2026, 3, d) for d in (2, 3)]
    chosen = files_between(c, plan_ingest(c), *days)
    assert [Path(f.path).name for f in chosen] == ["a[1-9].parquet"]
    monkeypatch.setattr("roadfuse_core.cluster.open_cluster", lambda *_: nullcontext())
    done = CliRunner().invoke(app, ["backfill", str(tmp_path / "city.yaml"), "--from", "2026-03-02", "--to", "2026-03-03"])
    assert (done.exit_code, done.exception) == (0, None)
    assert "a[1-9].parquet" in done.output
    entry = next(iter(ledger(c).values()))
    assert ([Path(f["path"]).name for f in entry["files"]], entry["rows"], counted(c)) == (["a[1-9].parquet"], 30, 30)
    assert ingest(c)["rows"] == 31 + 32 + 33


def test_replace_and_quarantine_of_files_with_brackets(tmp_path):
    c = city(tmp_path)
    write(tmp_path / "a[1].parquet", 30, 1)
    write(tmp_path / "a1.parquet", 50, 2)
    far = table(70, 4).set_column(0, "lon", pa.array(np.full(70, 20.0)))
    pq.write_table(pa.concat_tables([table(20, 5), far]), tmp_path / "b[2].parquet")
    first = ingest(c, ["a[1].parquet"])
    away = tmp_path / "away [3]"
    entry = ingest(c, ["b[2].parquet"], replace=first["dump"], quarantine=away)
    assert (entry["rows"], entry["rejected"], counted(c)) == (90, {"outside": 70}, 20)
    rejected = [pq.read_table(p) for p in away.rglob("*.parquet")]
    assert sum(r.num_rows for r in rejected) == 70


def test_large_files_in_pieces_and_shuffled_in_a_workspace_with_brackets(tmp_path, monkeypatch):
    c = city(tmp_path / "w [1]", "*.parquet")
    columns = c.points.columns.model_copy(update={"vehicle": "v"})
    by_vehicle = c.model_copy(update={"workspace": "v", "points": c.points.model_copy(update={"columns": columns})})
    write(tmp_path / "w [1]" / "a[1].parquet", 2503, 1)
    write(tmp_path / "w [1]" / "a1.parquet", 1501, 2)
    monkeypatch.setattr("roadfuse_core.cubes._plan.ROWS_PER_SLICE", 700)
    for one in (c, by_vehicle):
        assert ingest(one)["rows"] == 4004, one.workspace
        assert counted(one) + ledger(one).popitem()[1]["rejected"].get("teleport", 0) == 4004


def test_a_file_that_gives_other_rows_than_it_promised_is_refused(tmp_path, monkeypatch):
    """It is exchanged after the plan was made, which is when its footer was read."""
    c = city(tmp_path, "*.parquet")
    write(tmp_path / "a.parquet", 100, 1)
    ingest(c)
    write(tmp_path / "b.parquet", 100, 2)
    from roadfuse_core.cubes import _ingest

    def exchange(*arguments):
        plan = plan_ingest(*arguments)
        write(tmp_path / "b.parquet", 150, 3)
        return plan

    monkeypatch.setattr(_ingest, "plan_ingest", exchange)
    with pytest.raises(DataError, match=r"b\.parquet.*150.*100|b\.parquet .*changed"):
        ingest(c, ["b.parquet"])
    assert counted(c) == 100
    assert len(ledger(c)) == 1


def test_a_folder_gives_its_data_files_and_nothing_else(tmp_path):
    c = city(tmp_path, "in")
    write(tmp_path / "in" / "a.parquet", 40, 1)
    write(tmp_path / "in" / "deep [1]" / "b.parquet", 41, 2)
    for name in ("README.md", "README.txt", "LICENSE.txt", "_SUCCESS", ".a.parquet.crc", "a.parquet.md5", "notes.pdf"):
        (tmp_path / "in" / name).write_text("words, words\n1,2\n")
    check_city(c)
    assert ingest(c)["rows"] == 81
    assert ingest(c, ["i*"]) is None  # folders that a pattern matches stand for their files too


@pytest.mark.parametrize("text", ["nothing[1].csv", "a\0b.csv", "in/none"])
def test_what_matches_nothing_is_one_line(tmp_path, text):
    with pytest.raises(ConfigError, match=r"^points\.sources: .* matches no file; correct the path") as caught:
        plan_ingest(city(tmp_path), [text])
    assert "\n" not in str(caught.value)


def test_a_name_that_is_not_utf_8_is_refused_by_name(tmp_path):
    broken = tmp_path / b"caf\xe9.csv".decode("utf-8", "surrogateescape")
    write(tmp_path / "a.csv", 10, 1)
    shutil.copy(tmp_path / "a.csv", broken)
    with pytest.raises(ConfigError, match=r"caf.*e9\.csv.*not UTF-8; rename"):
        plan_ingest(city(tmp_path, "*.csv"))


def test_a_line_feed_in_a_name_does_not_break_a_message(tmp_path):
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "a\nb.csv", index=False)
    with pytest.raises(ConfigError) as caught:
        plan_ingest(city(tmp_path, "*.csv"))
    assert "\n" not in str(caught.value)
    assert r"a\nb.csv" in str(caught.value)


def test_parts_that_exist_as_written_are_no_patterns(tmp_path):
    for name in ("data [12]/a.csv", "data 1/a.csv", "data 2/x[3].csv", "data 2/x3.csv"):
        write(tmp_path / name, 3, 1)
    names = {text: [str(p.relative_to(tmp_path)) for p in find_paths(tmp_path, text)] for text in
             ("data [12]/*.csv", "data [0-9]/a.csv", "*/x[3].csv", "data 2/x[0-9].csv", "data 1")}  # fmt: skip
    assert names == {
        "data [12]/*.csv": ["data [12]/a.csv"], "data [0-9]/a.csv": ["data 1/a.csv"], "*/x[3].csv": ["data 2/x[3].csv"],
        "data 2/x[0-9].csv": ["data 2/x3.csv"], "data 1": ["data 1"],
    }  # fmt: skip
