"""What lies in a training's folder: never executed, never trusted by its existence, and the time of all its runs."""

import json
import os
import pickle
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.errors import StoreError
from roadfuse_core.training import TrainingStoppedError, load_recipe, train
from roadfuse_core.training import _fit as fit
from roadfuse_core.training._module import RoadModule
from tests.unit.test_training import TINY, city, recipe  # noqa: F401

# Three steps an epoch, two epochs; a state after every step.
SHORT = {"batch": 3, "epoch_windows": 9, "stages": [{"epochs": 2}], "network.width": 0.03125}


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def both(city, tmp_path_factory):
    """A run that was interrupted in its fifth step beside one that was not, and their recipe."""
    folder = tmp_path_factory.mktemp("runs")
    path = city.root.parent / "interrupted.yaml"
    path.write_text(yaml.safe_dump(TINY))
    made = load_recipe(path, SHORT)
    train(made, folder / "whole", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 4)
        with pytest.raises(TrainingStoppedError, match="its state is kept"):
            train(made, folder / "run", threads=1)
    return made, folder


@pytest.fixture
def stopped(both, tmp_path):
    """The interrupted run, for one test alone."""
    made, folder = both
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return made, tmp_path / "run", tmp_path / "whole"


def stop_in(monkeypatch, wanted):
    """Ctrl-C in a step, once; a state after every step before it."""
    monkeypatch.setattr(fit, "STATE_EVERY_S", 0)
    step, left = RoadModule.training_step, [wanted]

    def interrupted(module, batch, number):
        if left == [module.global_step]:
            left.clear()
            raise KeyboardInterrupt
        return step(module, batch, number)

    monkeypatch.setattr(RoadModule, "training_step", interrupted)


def same_weights(a, b):
    a, b = load_file(a / "checkpoint.safetensors"), load_file(b / "checkpoint.safetensors")
    return all(torch.equal(a[k], b[k]) for k in a)


def with_evil(state, path):
    """The bytes of a state that would go on as before, with one more thing in it."""
    torch.save(torch.load(state, weights_only=True) | {"hook": Evil(path)}, state)


def as_plain_pickle(state, path):
    state.write_bytes(pickle.dumps(Evil(path), protocol=2))


@pytest.mark.parametrize("plant", [with_evil, as_plain_pickle])
def test_a_state_that_would_run_code_is_one_line(stopped, tmp_path, plant):
    made, run, _ = stopped
    plant(run / "stage-0/last.ckpt", tmp_path / "hacked")
    with pytest.raises(
        StoreError, match=r"last\.ckpt: holds more than numbers and is no state of a training; remove it"
    ) as error:
        train(made, run, threads=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2]])
def test_a_damaged_state_begins_its_stage_again(stopped, caplog, damage):
    made, run, whole = stopped
    state = run / "stage-0/last.ckpt"
    state.write_bytes(damage(state.read_bytes()))
    train(made, run, threads=1)
    assert "its stage begins again" in caplog.text
    assert same_weights(run, whole)


@pytest.mark.parametrize("left", ["", "{", "null"])
def test_a_stage_whose_end_cannot_be_read_goes_on_from_its_state(stopped, left):
    made, run, whole = stopped
    (run / "stage-0/done.json").write_text(left)
    train(made, run, threads=1)
    assert same_weights(run, whole)


def test_weights_of_a_finished_stage_that_would_run_code_are_one_line(city, tmp_path, monkeypatch):
    path = city.root.parent / "evil.yaml"
    path.write_text(yaml.safe_dump(TINY | {"stages": [{"epochs": 1}], "keep": "best"}))
    save = fit._save

    def killed(*arguments):
        monkeypatch.setattr(fit, "_save", save)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "_save", killed)
    with pytest.raises(TrainingStoppedError):
        train(load_recipe(path), tmp_path / "run", threads=1)
    with_evil(tmp_path / "run/stage-0/best.ckpt", tmp_path / "hacked")
    made = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run")])
    assert isinstance(made.exception, StoreError), made.output
    assert "best.ckpt: holds more than numbers" in str(made.exception)
    assert "\n" not in str(made.exception)
    assert not (tmp_path / "hacked").exists()


def test_a_stage_that_the_commit_before_has_ended_is_not_run_again(recipe, tmp_path, monkeypatch):
    made = recipe(**SHORT | {"stages": [{"epochs": 1}, {"epochs": 1, "labels": "existing_map"}]})
    train(made, tmp_path / "whole", threads=1)
    step, stages = RoadModule.training_step, []

    def interrupted(module, batch, number):
        stages.append(module.stage)
        if stages == [0, 0, 0, 1]:
            raise KeyboardInterrupt
        return step(module, batch, number)

    monkeypatch.setattr(RoadModule, "training_step", interrupted)
    with pytest.raises(TrainingStoppedError):
        train(made, tmp_path / "run", threads=1)
    end = tmp_path / "run/stage-0/done.json"
    assert json.loads(end.read_text()).keys() == {"epochs", "seconds"}
    end.write_text("1")  # as it was before seconds were kept
    train(made, tmp_path / "run", threads=1)
    assert stages == [0, 0, 0, 1, 1, 1, 1]
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_time_of_a_training_is_that_of_all_its_runs(recipe, tmp_path, monkeypatch):
    """A watch that goes on by ten seconds in every step: six steps are a minute, in one run or in two."""
    now = [0.0]
    monkeypatch.setattr(
        "roadfuse_core.training._module.time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    )
    step = RoadModule.training_step

    def slow(module, batch, number):
        now[0] += 10
        return step(module, batch, number)

    monkeypatch.setattr(RoadModule, "training_step", slow)
    made = recipe(**SHORT)
    train(made, tmp_path / "whole", threads=1)
    stop_in(monkeypatch, 4)
    with pytest.raises(TrainingStoppedError):
        train(made, tmp_path / "run", threads=1)
    train(made, tmp_path / "run", threads=1)
    seconds = [json.loads((tmp_path / name / "done.json").read_text())["seconds"] for name in ("whole", "run")]
    assert seconds == [60, 60]
