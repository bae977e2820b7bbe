"""Sources on the web, open and signed; and what an address keeps secret stays so."""

import gzip
import json
import logging
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
import yaml

from roadfuse_core.check import check_city
from roadfuse_core.cubes import ingest, ledger, plan_ingest
from roadfuse_core.errors import ConfigError, DataError, RoadFuseError, StoreError, holds_credentials, without_secrets
from roadfuse_core.points import Part, find_sources
from roadfuse_core.settings import City, InvalidCityError, load_city

pytest.importorskip("aiohttp", reason="fsspec reads the web through it; the extra s3 brings it")
ROWS = 73
GOOD = "6f1d"


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder: below `signed` only with a good signature, below `ranges` also in ranges; what was asked is noted."""

    asked: list[str]

    def send_head(self):
        self.asked.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        if url.path.startswith("/signed") and not parse_qs(url.query).get("X-Amz-Signature", [""])[0].startswith(GOOD):
            self.send_error(403, f"bad signature in {self.path}")
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True


@pytest.fixture
def web(tmp_path):
    """Address of a server of the folder `web`."""
    (tmp_path / "web" / "signed").mkdir(parents=True)
    handler = type("Noting", (Handler,), {"asked": []})
    server = Server(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def table(seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    stamps = pd.Timestamp("2026-03-02") + pd.to_timedelta(np.arange(ROWS), unit="s")
    return pd.DataFrame({"lon": 13 + 0.01 * rng.random(ROWS), "lat": 47 + 0.01 * rng.random(ROWS), "t": stamps})


def city(folder: Path, *sources: str) -> City:
    spec = {
        "name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
        "points": {"sources": list(sources), "columns": {"lon": "lon", "lat": "lat", "time": "t"}}, "model": {"weights": "kde"},
    }  # fmt: skip
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return load_city(folder / "city.yaml")


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.csv.gz", "names [1] of%20it.parquet"])
def test_a_file_of_a_server_that_knows_no_ranges(web, tmp_path, name):
    place = tmp_path / "web" / name
    if name.endswith("parquet"):
        table().to_parquet(place)
    else:
        text = table().to_csv(index=False).encode()
        place.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    url = f"{web}/{name.replace('%', '%25').replace(' ', '%20').replace('[', '%5B').replace(']', '%5D')}"
    c = city(tmp_path, url)
    check_city(c)
    entry = ingest(c)
    assert (entry["rows"], entry["kept"], entry["files"][0]["path"]) == (ROWS, ROWS, url)
    assert ingest(c) is None


def test_a_signature_is_no_part_of_a_file(web, tmp_path, caplog):
    """A new signature for what is known is nothing new; no ledger, plan, record of a job or message shows one."""
    caplog.set_level(logging.DEBUG, "roadfuse_core")
    table().to_parquet(tmp_path / "web" / "signed" / "a.parquet")
    first, second = (f"{web}/signed/a.parquet?X-Amz-Signature={GOOD}{k}&X-Amz-Expires=60&versionId=7" for k in ("aaaa", "bbbb"))
    entry = ingest(city(tmp_path, first))
    assert (entry["rows"], len(entry["files"])) == (ROWS, 1)
    again = city(tmp_path, second)
    plan = plan_ingest(again)
    assert (plan.files, len(plan.known)) == ([], 1)
    assert ingest(again) is None
    table(2).to_parquet(tmp_path / "web" / "signed" / "b.parquet")
    third = plan_ingest(again, [second.replace("a.parquet", "b.parquet")])
    told = json.dumps(ledger(again)) + repr(third) + repr(third.sources) + repr(Part((second,))) + caplog.text
    assert GOOD not in told
    assert pickle.loads(pickle.dumps(third)).sources[0].location.endswith("versionId=7")


def test_another_file_behind_the_same_path_is_another_file(web, tmp_path):
    """Parameters that are no signature belong to the name, but not as they are: they may be secret too."""
    table().to_csv(tmp_path / "web" / "get.csv", index=False)
    c = city(tmp_path, f"{web}/get.csv?day=1&secret=abc", f"{web}/get.csv?day=2&secret=abc")
    labels = {f.label for f in find_sources(c)}
    assert len(labels) == 2
    assert "abc" not in str(labels)


@pytest.mark.parametrize("what", ["refused", "missing", "damaged"])
def test_no_message_shows_a_signature(web, tmp_path, what):
    (tmp_path / "web" / "signed" / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "web" / "signed" / "a.csv").write_bytes(b"lon,lat,t\n" + b"13,47,2026-03-01,9\n" * 9)
    name = {"refused": "a.parquet", "missing": "b.parquet", "damaged": "a.parquet"}[what]
    sign = "0bad" if what == "refused" else GOOD
    names = [name, "a.csv"] if what == "damaged" else [name]
    for one in names:
        with pytest.raises((DataError, ConfigError)) as caught:
            ingest(city(tmp_path, "*"), [f"{web}/signed/{one}?X-Amz-Signature={sign}5e7"])
        assert f"/signed/{one}" in str(caught.value)
        shown = caught.value
        while shown is not None:  # and what a traceback prints above it
            assert f"{sign}5e7" not in str(shown)
            shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


@pytest.mark.parametrize("source", [
    "s3://AKIAKEY:hush/hush@bucket/a.parquet", "s3://AKIAKEY:hush@bucket/a@b/*.parquet", "http://me:hush@host.example/a.parquet",
    "https://hush@host.example/a.parquet", "gs://me:hush@bucket/**", "ftp://me:hush@host.example/a.csv", "s3://k:hush@b/z.zip::*.csv",
])  # fmt: skip
def test_addresses_with_credentials_are_refused_without_repeating_them(tmp_path, source):
    c = city(tmp_path, source)
    for way in (plan_ingest, check_city):
        with pytest.raises(RoadFuseError) as caught:
            way(c)
        assert caught.value.exit_code == 2
        assert "was given with a user or password; leave them out" in str(caught.value)
        assert "hush" not in str(caught.value)
        assert "hush" not in repr(pickle.loads(pickle.dumps(caught.value)))


def test_a_mistake_beside_a_secret_does_not_show_it(tmp_path):
    (tmp_path / "city.yaml").write_text(
        "name: c\nworkspace: w\ngrid: {bounds: [13, 47, 13.1, 47.1]}\npoints: {sources: 's3://KEY:hush@b/x', columns: {lon: x, lat: y}}\n"
    )
    with pytest.raises(InvalidCityError, match=r"points\.sources: 's3://b/x' is wrong") as caught:
        load_city(tmp_path / "city.yaml")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(("text", "shown"), [
    ("cannot read s3://K:a/b+c@bucket/x (no)", "cannot read s3://bucket/x (no)"),
    ("at http://h:8080/a@b?x=1&sig=hush, or", "at http://h:8080/a@b?… or"),
    ("https://h/a.parquet?X-Amz-Signature=hush'; copy", "https://h/a.parquet?…'; copy"),
    ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
    ("s3://bucket/day=1/a?b[1].parquet", "s3://bucket/day=1/a?b[1].parquet"),
    ("mail me@home.example: 3 of 4", "mail me@home.example: 3 of 4"),
    ("/data/a?b=c.csv", "/data/a?b=c.csv"),
])  # fmt: skip
def test_texts_lose_what_addresses_keep_secret_and_nothing_else(text, shown):
    assert without_secrets(text) == shown
    for kind in (DataError, StoreError, RoadFuseError):
        assert str(kind(text)) == shown


def test_a_port_is_no_password():
    assert not holds_credentials("http://host:8080/a@b/c.csv")
    assert not holds_credentials("s3://bucket/a:b@c")
    assert holds_credentials("http://me@host:8080/c.csv")


def test_a_store_whose_package_is_missing_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(
        ConfigError, match=r"points\.sources: 'gs://bucket/a\.parquet' needs a package \(.*gcsfs.*\); install it"
    ):
        plan_ingest(city(tmp_path, "gs://bucket/a.parquet"))
