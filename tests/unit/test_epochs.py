"""Which windows a training asks for: new ones in every epoch and stage, on every rank, and when it goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from dask.distributed import Client, LocalCluster
from safetensors.torch import load_file
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core import training
from roadfuse_core.settings import ClusterSpec
from roadfuse_core.training import TrainingStoppedError, TrainingWindows, train
from tests.unit.test_training import TINY, city, recipe  # noqa: F401

# Three steps of three windows an epoch; the tenth window of an epoch is left out.
UNEVEN = {"batch": 3, "epoch_windows": 10}


@pytest.fixture
def asked(monkeypatch):
    """Numbers of the windows that were read, by stage, in the order of reading."""
    numbers, read = defaultdict(list), TrainingWindows.__getitem__

    def note(self, number):
        numbers[self.stage].append(number)
        return read(self, number)

    monkeypatch.setattr(TrainingWindows, "__getitem__", note)
    return numbers


def _weights(folder):
    return load_file(folder / "checkpoint.safetensors")


def _equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_every_epoch_and_every_stage_draws_new_windows(recipe, tmp_path, asked):
    made = recipe(**UNEVEN, stages=[{"epochs": 4}, {"epochs": 2, "labels": "existing_map"}])
    train(made, tmp_path / "run", threads=1)
    assert asked == {0: list(range(36)), 1: list(range(18))}


PLATEAU = {"keep": "best", "patience": 9, "optimiser": {"schedule": "plateau", "lr": 0.01}}


@pytest.mark.parametrize(("step", "fields"), [(1, {}), (2, {}), (6, {}), (4, PLATEAU), (3, PLATEAU)])
def test_a_run_stopped_within_an_epoch_asks_for_the_rest(recipe, tmp_path, asked, monkeypatch, step, fields):
    made = recipe(**UNEVEN, **fields, stages=[{"epochs": 3}])
    whole = train(made, tmp_path / "whole", threads=1)
    asked.clear()
    monkeypatch.setattr(training._fit, "STATE_EVERY_S", 0)
    _stop_before(step, monkeypatch)
    with pytest.raises(TrainingStoppedError, match="its state is kept; run the same command again and it goes on from there"):
        train(made, tmp_path / "stopped", threads=1)
    assert max(asked[0]) == step * 3 + 2, "it stopped within the batch of that step"
    asked.clear()
    again = train(made, tmp_path / "stopped", threads=1)
    # The state is of the step before, but for an epoch's last step: there it is kept after the validation.
    assert asked[0] == list(range(step * 3, 27))
    assert _equal(_weights(tmp_path / "whole"), _weights(tmp_path / "stopped"))
    assert (again.validation_g_iou, again.epochs) == (whole.validation_g_iou, whole.epochs)


def _stop_before(step, monkeypatch):
    """Ctrl-C in the midst of that step, once."""
    learn, stopped = training._module.RoadModule.training_step, []

    def interrupted(module, batch, number):
        if module.global_step == step and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return learn(module, batch, number)

    monkeypatch.setattr(training._module.RoadModule, "training_step", interrupted)


def _note_windows(folder):
    """On a worker: each window that is read leaves a line in the worker's own file."""
    read = TrainingWindows.__getitem__

    def note(self, number):
        with (Path(folder) / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{number}\n")
        return read(self, number)

    TrainingWindows.__getitem__ = note


def test_two_ranks_share_all_windows_and_none_twice(recipe, tmp_path):
    (tmp_path / "asked").mkdir()
    made = recipe(batch=6, epoch_windows=14, stages=[{"epochs": 3}], ranks=2)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        client.run(_note_windows, str(tmp_path / "asked"))
        train(made, tmp_path / "run", cluster=ClusterSpec(kind=cluster.scheduler_address))
    files = list((tmp_path / "asked").glob("*.txt"))
    parts = [[int(n) for n in f.read_text().split()] for f in files]
    assert len(parts) == 2
    assert sorted(parts[0] + parts[1]) == list(range(36))
    assert sorted(parts, key=min)[0][:6] == [0, 1, 2, 6, 7, 8], "each rank has half of every batch"


def _as_in_a_terminal():
    """A suite that runs in the background passes on that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on(city, tmp_path, kind):
    path = city.root.parent / f"interrupted-{kind}.yaml"
    path.write_text(yaml.safe_dump(TINY | {"stages": [{"epochs": 400}]}))
    command = [sys.executable, "-m", "flows.cli", "train", str(path), "--out", str(tmp_path / "run")]
    state = tmp_path / "run/stage-0/last.ckpt"
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_as_in_a_terminal)
    while not state.is_file():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    running.send_signal(kind)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert f"error: {tmp_path / 'run'}: the training was stopped, its state is kept; run the same command again" in err
    assert "Traceback" not in err


def test_a_dry_run_states_the_time_and_writes_nothing(recipe, city, tmp_path):
    path = city.root.parent / "timed.yaml"
    path.write_text(yaml.safe_dump(TINY | {"stages": [{"epochs": 1000}]}))
    before = sorted(city.root.parent.rglob("*"))
    result = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    told = re.search(r"about (\d+) min on this machine", result.output)
    assert told, result.output
    assert int(told[1]) >= 1, "2,000 steps do not fit in less"
    assert sorted(city.root.parent.rglob("*")) == before
