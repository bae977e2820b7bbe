"""What commands print is what things are called: names are no markup, and a terminal that goes away ends nothing."""

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from flows.cli import app
from flows.console import prepare_prefect
from tasks.progress import ConsoleProgress, SafeProgress

# Closing tags, styles and pictures of rich; the slash of the first comes from a folder called "x[".
NAMES = ["x[/b].csv", "day/[red]a.csv", "day/:car:.csv", "day/trips[1].csv"]


@pytest.fixture
def city_file(tmp_path) -> Path:
    """A city with one good dump and empty ones, which `check` names, in a folder whose name is a closing tag."""
    dumps = tmp_path / "dumps"
    for name in NAMES:
        (dumps / name).parent.mkdir(parents=True, exist_ok=True)
        (dumps / name).write_text("lon,lat\n")
    (dumps / "good.csv").write_text("lon,lat\n13.001,47.001\n")
    spec = {"name": "c", "workspace": "work", "grid": {"bounds": [13.0, 47.0, 13.01, 47.01], "resolution_m": 1.0, "tile_px": 64},
            "points": {"sources": ["../../dumps"], "columns": {"lon": "lon", "lat": "lat"}, "period": "all"},
            "model": {"weights": "kde"}}  # fmt: skip
    folder = tmp_path / "c[/bold]"
    folder.mkdir(parents=True)
    (folder / "city.yaml").write_text(yaml.safe_dump(spec))
    return folder / "city.yaml"


def test_names_of_files_are_printed_as_they_are(city_file):
    done = CliRunner().invoke(app, ["check", str(city_file)])
    assert done.exit_code == 0, done.output
    for name in NAMES:
        assert f"/dumps/{name} is empty\n" in done.output
    assert f"ready: roadfuse refresh {city_file}\n" in done.output


def test_a_name_that_is_no_utf8_is_printed(city_file):
    odd = os.fsencode(city_file.parents[2] / "dumps") + b"/\xff.csv"
    with open(odd, "w") as file:
        file.write("lon,lat\n")
    command = [sys.executable, "-m", "flows.cli", "check", city_file]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"udcff.csv' has a name that is not UTF-8; rename the file" in done.stderr


def test_output_that_cannot_be_written_is_no_success(city_file):
    command = [sys.executable, "-m", "flows.cli", "check", city_file]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith(b"error: ")


def test_the_address_of_a_server_is_printed_without_its_password(monkeypatch, capsys):
    monkeypatch.setenv("PREFECT_API_URL", "https://somebody:word-of-nobody@prefect.example:4200/api")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "WARNING")
    prepare_prefect()
    told = capsys.readouterr().err
    assert "prefect.example:4200/api" in told
    assert "word-of-nobody" not in told


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_names_as_they_are(monkeypatch, terminal):
    tell = ConsoleProgress()
    shown = io.StringIO()
    plain = Console(file=shown, width=100, force_terminal=terminal, markup=False)
    tell.console = plain
    tell.live.live.console = plain
    tell.live.disable = not terminal
    with tell:
        tell("scoring, [/b] [red] 1", 2, 2)
    assert "scoring, [/b] [red] 1" in shown.getvalue()


def test_a_terminal_that_goes_away_ends_no_work(monkeypatch, caplog):
    """As when the connection to a machine breaks under `nohup`: writing to the terminal fails from then on."""
    here, there = pty.openpty()
    terminal = os.fdopen(there, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.WARNING), ConsoleProgress() as tell:
        assert tell.console.is_terminal
        tell("reading points", 1, 3)
        os.close(here)
        tell("reading points", 2, 3)
        tell("writing blocks", 0, 3)
        tell("writing blocks", 3, 3)
    monkeypatch.undo()
    assert "the work goes on" in caplog.text
    with contextlib.suppress(OSError):
        terminal.close()


def test_a_receiver_that_fails_rests_and_the_others_go_on(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("tasks.progress.time.monotonic", lambda: now[0])
    tried, got = [], []

    def fails(what, done, total):
        tried.append(done)
        raise ConnectionError("no server")

    tell = SafeProgress(fails, lambda *step: got.append(step))
    for done in range(4):
        now[0] += 100.0
        tell("a", done, 3)
    assert tried == [0, 3]
    assert [step[1] for step in got] == [0, 1, 2, 3]
    assert caplog.text.count("progress cannot be shown (ConnectionError: no server); the work goes on") == 1
