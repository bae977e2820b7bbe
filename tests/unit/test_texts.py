"""Text as other programs write it is read in full, and text that is damaged is refused by name and line."""

import gzip
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from roadfuse_core.check import check_city
from roadfuse_core.cubes import CubeReader, cubes_path, ingest, ledger, plan_ingest
from roadfuse_core.errors import ConfigError, DataError, RoadFuseError, StoreError
from roadfuse_core.points import find_sources, materialise
from roadfuse_core.settings import City, load_city

ROWS = 91


def table(rows: int = ROWS) -> pd.DataFrame:
    rng = np.random.default_rng(rows)
    stamps = pd.Timestamp("2026-03-02 08:00:00") + pd.to_timedelta(np.arange(rows), unit="s")
    return pd.DataFrame({"vid": [f"V{k % 7}" for k in range(rows)], "lon": (13 + 0.01 * rng.random(rows)).round(7),
                         "lat": (47 + 0.01 * rng.random(rows)).round(7), "t": stamps})  # fmt: skip


def city(folder: Path, *sources: str, **points) -> City:
    still = {"teleport_kmh": None, "duplicates": False}
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": list(sources), "columns": {"vehicle": "vid", "lon": "lon", "lat": "lat", "time": "t"}, "clean": still} | points,
        "model": {"weights": "kde"},
    }  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


def pixels(c: City) -> np.ndarray:
    return CubeReader(cubes_path(c)).window("count", 0, 0, *c.make_grid().shape)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> np.ndarray:
    """The counts of the plain file."""
    folder = tmp_path_factory.mktemp("plain")
    table().to_parquet(folder / "a.parquet")
    c = city(folder, "a.parquet")
    ingest(c)
    return pixels(c)


PLAIN = table().to_csv(index=False)
LINES = PLAIN.splitlines()
AS_OTHERS_WRITE = {
    "a byte order mark and quotes": (b"\xef\xbb\xbf" + table().to_csv(index=False, quoting=1).encode(), {}),
    "line ends in quotes": (table().assign(note=["two\nlines" if k % 7 == 3 else 'say ""x"", y' for k in range(ROWS)]).to_csv(index=False), {}),
    "decimal commas": (table().to_csv(index=False, sep=";", decimal=","), {"csv": {"delimiter": ";", "decimal": ","}}),
    "decimal commas in quotes": (table().to_csv(index=False, decimal=",", quoting=1), {"csv": {"decimal": ","}}),
    "mixed line ends": ("".join(line + ("\r\n" if k % 3 == 0 else "\n") for k, line in enumerate(LINES)), {}),
    "old Macintosh line ends": (PLAIN.replace("\n", "\r"), {}),
    "Latin-1": (table().assign(street="Straße").to_csv(index=False).encode("latin-1"), {"csv": {"encoding": "latin-1"}}),
    "UTF-16": (table().assign(street="Straße").to_csv(index=False, sep="\t").encode("utf-16"), {"csv": {"encoding": "utf-16", "delimiter": "\t"}}),
    "spaces behind commas": (PLAIN.replace(",", ", "), {}),
    "spaces and quotes": (table().to_csv(index=False, quoting=1).replace(",", ", "), {}),
    "a comma at the end of each line": (PLAIN.replace("\n", ",\n"), {}),
    "blank lines at the end": (PLAIN + "\n\n\n", {}),
    "no line end at the end": (PLAIN.rstrip("\n"), {}),
    "no header": (table().to_csv(index=False, header=False), {"csv": {"header": False, "names": ["vid", "lon", "lat", "t"]}}),
    "names that differ by case alone": (table().assign(LON=1.0, Lat=2.0)[["LON", "Lat", "vid", "lon", "lat", "t"]].to_csv(index=False), {}),
    "columns without a name, and twice the same": (",".join([LINES[0], "", "", "x", "x"]) + "\n" + "".join(f"{r},1,2,3,4\n" for r in LINES[1:]), {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", AS_OTHERS_WRITE)
def test_text_as_others_write_it(tmp_path, expected, kind):
    content, settings = AS_OTHERS_WRITE[kind]
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    c = city(tmp_path, "a.csv", **settings)
    check_city(c)
    entry = ingest(c)
    assert entry["kept"] == ROWS
    assert set(entry["rejected"]) <= {"not_finite"}  # blank lines are no points
    assert np.array_equal(pixels(c), expected)
    assert entry["time"] == ["2026-03-02T08:00:00", "2026-03-02T08:01:30"]


def test_quotes_that_begin_late_are_quotes(tmp_path):
    """Two exports put together: the guess from the first 20,480 rows would be that there are none."""
    bare = table(27_001).to_csv(index=False)
    (tmp_path / "a.csv").write_text(bare + table(83).to_csv(index=False, header=False, quoting=1))
    entry = ingest(city(tmp_path, "a.csv"))
    assert (entry["rows"], entry["kept"]) == (27_084, 27_084)


def test_one_number_that_is_none_costs_its_row_alone(tmp_path):
    frame = table()[["lon", "lat"]].astype(str)
    frame.loc[40, "lon"] = "N/A"
    frame.loc[41, "lat"] = "12 km"
    frame.to_csv(tmp_path / "a.csv", index=False)
    entry = ingest(city(tmp_path, "a.csv", columns={"lon": "lon", "lat": "lat"}, period="all"))
    assert (entry["kept"], entry["rejected"]) == (ROWS - 2, {"not_finite": 2})


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_columns_that_differ_by_case_alone(tmp_path, expected, kind):
    """Raw positions as LON and LAT before the matched ones; in a second file they come behind, and in a third there are none."""
    frame = table()
    raw = frame.assign(LON=frame.lon - 0.001, LAT=frame.lat + 0.003, Vid="W")
    for name, columns, part in (("a", ["LON", "LAT", "Vid", "vid", "lon", "lat", "t"], slice(0, 31)),
                                ("b", ["vid", "lon", "lat", "t", "LAT", "LON"], slice(31, 60)),
                                ("c", ["t", "lat", "lon", "vid"], slice(60, ROWS))):  # fmt: skip
        some = raw[columns].iloc[part]
        some.to_parquet(tmp_path / f"{name}.parquet") if kind == "parquet" else some.to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    c = city(tmp_path, f"*.{kind}")
    assert ingest(c)["kept"] == ROWS
    assert np.array_equal(pixels(c), expected)


def test_a_column_that_a_file_has_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(PLAIN.replace("vid,lon,lat,t", "vid,lon,lon,t"))
    pq.write_table(pa.Table.from_arrays([pa.array([1.0])] * 3, ["lon", "lat", "lon"]), tmp_path / "b.parquet")
    for name, columns in (("a.csv", {"lon": "lon", "lat": "t"}), ("b.parquet", {"lon": "lon", "lat": "lat"})):
        with pytest.raises(ConfigError, match=r"points\.columns\.lon: 'lon' names several columns of .*; give each"):
            plan_ingest(city(tmp_path, name, columns=columns, period="all"))


OPEN_QUOTE = PLAIN + '"V1,13.001,47.001,2026-03-02 08:00:00\n' + "".join(f"{line}\n" for line in LINES[1:])
REFUSED = {
    "an open quote": (OPEN_QUOTE, {}, DataError, rf"a\.csv has a quote in line {ROWS + 2} that does not close"),
    "a quote closed in a later line": (OPEN_QUOTE + '"V2",13.002,47.002,2026-03-02 08:00:00\n', {}, DataError, rf"quote in line {ROWS + 2}"),
    "a row with more cells": (PLAIN + "V1,13.001,47.001,2026-03-02 08:00:00,9\n", {}, DataError, r"more cells than there are columns, in .*a\.csv"),
    "Latin-1 unsaid": (table().assign(s="Straße").to_csv(index=False).encode("latin-1"), {}, DataError, r"a\.csv is not text in UTF-8 .*\.encoding, for example to latin-1"),
    "UTF-16 unsaid": (PLAIN.encode("utf-16"), {}, DataError, "for example to utf-16"),
    "Latin-1 in the last line": (PLAIN.encode() * 900 + b"Stra\xdfe,1,2,3\n", {}, DataError, r"a\.csv .*(utf-8|unicode)"),
    "another separator": (PLAIN.replace(",", ";"), {}, ConfigError, r"points\.csv\.delimiter: ',' does not separate .*set it to ';'"),
    "decimal commas": (table().to_csv(index=False, sep=";", decimal=","), {"csv": {"delimiter": ";"}}, ConfigError, r"points\.csv\.decimal: '\.' does not fit numbers such as '13,.*set it to ','"),
    "fewer names than columns": (table().assign(a=1, b=2).to_csv(index=False, header=False), {"csv": {"header": False, "names": ["vid", "lon", "lat", "t"]}}, ConfigError, "are 4 names, and .* has 6 columns"),
    "degrees and minutes": (table().assign(lon="13°00.3'E").to_csv(index=False), {}, ConfigError, r"points\.columns\.lon: 'lon' holds no number in .*13°00"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_text_that_cannot_be_read_is_refused_with_the_reason(tmp_path, kind):
    content, settings, error, message = REFUSED[kind]
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    c = city(tmp_path, "a.csv", **settings)
    with pytest.raises(error, match=message) as caught:
        ingest(c, ["a.csv"])
    assert "\n" not in str(caught.value)
    assert ledger(c) == {}


def test_thousands_of_small_files_need_few_at_once(tmp_path):
    """Under a limit of 256 open files, which is a process of its own."""
    (tmp_path / "in").mkdir()
    for k in range(311):
        row = table().iloc[[k % ROWS]]
        row.assign(t=row.t + pd.Timedelta(days=k)).to_csv(tmp_path / "in" / f"{k:04d}.csv", index=False)
    city(tmp_path, "in")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); from pathlib import Path; "
        "from roadfuse_core.cubes import ingest; from roadfuse_core.settings import load_city; "
        f"print(ingest(load_city(Path({str(tmp_path / 'city.yaml')!r})))['rows'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "311\n"), done.stderr[-500:]


def test_too_many_open_files_is_not_the_fault_of_a_file(tmp_path):
    table().to_parquet(tmp_path / "a.parquet")
    city(tmp_path, "a.parquet")
    code = (
        "import os, resource, sys; from pathlib import Path; from roadfuse_core.points import check_columns, find_sources; "
        f"from roadfuse_core.settings import load_city; c = load_city(Path({str(tmp_path / 'city.yaml')!r})); files = find_sources(c)\n"
        "used = len(os.listdir('/proc/self/fd')); resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1, used - 1))\n"
        "try: check_columns(c, files)\nexcept Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("StoreError"), (done.stdout, done.stderr[-500:])
    assert "too many files are open; raise the limit" in done.stdout


def damaged_gzip(how: str) -> bytes:
    packed = bytearray(gzip.compress(PLAIN.encode() * 3))
    if how == "sum":
        packed[-6] ^= 1
    elif how == "length":
        packed[-1] ^= 1
    elif how == "stream":
        packed[len(packed) // 2] ^= 0xFF
    elif how == "cut":
        del packed[-9:]
    else:
        packed += b"garbage behind it"
    return bytes(packed)


@pytest.mark.parametrize("how", ["sum", "length", "stream", "cut", "more"])
def test_a_damaged_gzip_file_is_refused(tmp_path, how):
    (tmp_path / "a.csv.gz").write_bytes(damaged_gzip(how))
    c = city(tmp_path, "a.csv.gz")
    with pytest.raises(DataError, match=r"a\.csv\.gz is a damaged gzip file \(.*\); copy it again"):
        ingest(c, ["a.csv.gz"])
    assert ledger(c) == {}


def test_gzip_files_put_together_are_one(tmp_path):
    half = len(PLAIN) // 2
    (tmp_path / "A.CSV.GZ").write_bytes(gzip.compress(PLAIN[:half].encode()) + gzip.compress(PLAIN[half:].encode()))
    assert ingest(city(tmp_path, "*.GZ"))["kept"] == ROWS


def spoil(path: Path, how: str) -> None:
    """A zip whose only member cannot be unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/a.csv", PLAIN)
    whole = bytearray(path.read_bytes())
    local, central = whole.index(b"PK\x03\x04"), whole.index(b"PK\x01\x02")
    if how == "encrypted":
        whole[local + 6] |= 1
        whole[central + 8] |= 1
    elif how == "method":
        whole[local + 8 : local + 10] = whole[central + 10 : central + 12] = (97).to_bytes(2, "little")
    elif how == "stream":
        start = local + 30 + len("in/a.csv")
        whole[start + 100 : start + 140] = b"\xff" * 40
    elif how == "sum":
        whole[central + 16 : central + 20] = zlib.crc32(b"another").to_bytes(4, "little")
    else:
        del whole[len(whole) // 2 :]
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize("how", ["encrypted", "method", "stream", "sum", "cut"])
@pytest.mark.parametrize("way", [lambda c: ingest(c, ["a.zip::*.csv"]), check_city], ids=["ingest", "check"])
def test_a_zip_that_cannot_be_unpacked_is_one_line(tmp_path, how, way):
    spoil(tmp_path / "a.zip", how)
    c = city(tmp_path, "a.zip::*.csv")
    if way is check_city and how == "sum":
        pytest.skip("the sum of a member shows at its end, and check reads its beginning")
    with pytest.raises(RoadFuseError, match=r"a\.zip.* (cannot be unpacked|is not a readable zip) \(") as caught:
        way(c)
    assert "\n" not in str(caught.value)


def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", PLAIN)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.csv", PLAIN[:200])
    with pytest.raises(DataError, match=r"a\.zip holds two members called a\.csv; unpack it"):
        plan_ingest(city(tmp_path, "a.zip"))


def test_a_member_that_an_interrupted_run_left_is_taken_only_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", PLAIN)
    files = find_sources(city(tmp_path, "a.zip"))
    (path,) = map(Path, materialise(files, tmp_path / "unpacked"))
    stamp = path.stat().st_mtime_ns
    assert materialise(files, tmp_path / "unpacked") == [str(path)]
    assert path.stat().st_mtime_ns == stamp
    for spoilt in (PLAIN[:900], PLAIN.replace("13.0", "13.1", 1), ""):
        path.write_text(spoilt)
        materialise(files, tmp_path / "unpacked")
        assert path.read_text() == PLAIN


def test_a_member_for_which_there_is_no_room(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", PLAIN)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(StoreError, match=r"a\.zip::a\.csv unpacks to [\d,]+ bytes, and 1,000 are free.*make room"):
        materialise(find_sources(city(tmp_path, "a.zip")), tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists() or not list((tmp_path / "unpacked").iterdir())
