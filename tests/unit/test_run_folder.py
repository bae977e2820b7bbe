"""A run's folder may come from somebody else: its states are numbers, and nothing in them is run."""

import os

import pytest
import torch

from roadfuse_core.errors import StoreError
from roadfuse_core.training import train
from tests.unit.test_training import city, recipe  # noqa: F401


class Program:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class StoppedError(Exception):
    """Ends a training from outside."""


def stop_in_the_second_stage(what, done, total):
    if what == "training, stage 2":
        raise StoppedError


@pytest.mark.parametrize("ended", [False, True], ids=["state to go on from", "weights of a stage"])
def test_a_state_that_is_a_program_is_refused_and_not_run(recipe, tmp_path, ended):
    made, run = recipe(stages=[{"epochs": 1}, {"epochs": 1}]), tmp_path / "run"
    with pytest.raises(StoppedError):
        train(made, run, stop_in_the_second_stage, threads=1)
    if not ended:
        (run / "stage-0/done.json").unlink()
    state = run / "stage-0/last.ckpt"
    torch.save(torch.load(state, weights_only=True) | {"score": Program(tmp_path / "ran")}, state)
    with pytest.raises(StoreError, match=r"stage-0/last\.ckpt: holds more than numbers"):
        train(made, run, threads=1)
    assert not (tmp_path / "ran").exists()
