"""The server that `demo --server` starts answers its own UI and clients, and no other web page."""

import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from flows.cli import app
from flows.server import start_server
from roadfuse_core.cubes import ingest
from roadfuse_core.errors import ConfigError

pytestmark = pytest.mark.prefect


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("prefect")) as address:
        yield address


def ask(address: str, path: str, origin: str, method: str = "GET", **headers: str):
    """Status and the origin that the answer allows, as a browser sees them."""
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(f"{address}/api{path}", body, {"Origin": origin} | headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers.get("Access-Control-Allow-Origin")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Access-Control-Allow-Origin")


@pytest.mark.slow
def test_a_foreign_page_reads_nothing_and_starts_nothing(server):
    foreign = "http://evil.example"
    assert ask(server, "/admin/version", foreign) == (200, None)
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert ask(server, "/flows/filter", foreign, "OPTIONS", **preflight) == (400, None)
    # A form needs no preflight; without a token it changes nothing.
    assert ask(server, "/work_pools/", foreign, "POST", **{"Content-Type": "text/plain"}) == (403, None)
    assert ask(server, "/csrf-token?client=x", foreign)[1] is None


@pytest.mark.slow
def test_its_own_page_reads(server):
    port = server.rsplit(":", 1)[1]
    for host in ("127.0.0.1", "localhost"):
        origin = f"http://{host}:{port}"
        assert ask(server, "/admin/version", origin) == (200, origin)


@pytest.mark.slow
def test_its_clients_work(server):
    with temporary_settings({PREFECT_API_URL: f"{server}/api"}), get_client(sync_client=True) as client:
        assert client.create_flow_from_name("a-flow-of-a-test")


@pytest.mark.parametrize("cron", ["banana", "", "61 * * * *", "0 3 31 2 *", "R 3 * * *", "[/b] * * * *"])
def test_a_cron_line_that_never_comes_is_one_clear_line(small_city, cron):
    done = CliRunner().invoke(app, ["serve", str(small_city.root / "city.yaml"), "--cron", cron])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(f"--cron: {cron!r} is no cron line that ever comes; write ")
    assert "\n" not in str(done.exception)


def test_serving_without_a_server_is_one_clear_line(small_city):
    command = [sys.executable, "-m", "flows.cli", "serve", str(small_city.root / "city.yaml")]
    ingest(small_city)  # a served city has a workspace
    away = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=away)
    assert done.returncode == 2
    assert done.stderr.startswith("error: PREFECT_API_URL: 'http://127.0.0.1:9/api' does not answer")
    assert done.stderr.count("\n") == 1
