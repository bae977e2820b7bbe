"""Several ranks of one training, in real Dask workers: they are one, and none of them goes on alone."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from dask.distributed import Client
from safetensors.torch import load_file

from roadfuse_core import cluster as cluster_module
from roadfuse_core.cluster import ClusterLostError, open_cluster
from roadfuse_core.settings import ClusterSpec
from roadfuse_core.training import (
    DivergedError,
    StillWindows,
    TrainingWindows,
    compare,
    lay_split,
    split_recipe,
    train,
)
from roadfuse_core.training import _fit as fit
from roadfuse_core.training._loader import BatchLoader
from roadfuse_core.training._module import RoadModule
from roadfuse_core.training._windows import Batch, Draws, WindowOrder
from tests.unit.test_training import TINY, city, recipe  # noqa: F401

SHORT = {"optimiser.schedule": "constant", "stages": [{"epochs": 1}]}


@contextmanager
def workers_with(number, patch, *arguments):
    """Workers in which something is changed before the training comes; yields their specification."""
    with open_cluster(ClusterSpec(kind="local", workers=number)) as client:
        client.run(patch, *arguments)
        yield ClusterSpec(kind=client.scheduler_info(n_workers=0)["address"])


def read_by_threads():
    """On a worker: as beside a GPU."""
    fit.readers_for = lambda device: 3


def weights(folder):
    return load_file(folder / "checkpoint.safetensors")


def apart(a, b, keys):
    """The distance of two networks."""
    return sum(float((a[k].float() - b[k].float()).square().sum()) for k in keys) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "fields"), [(1, {}), (3, {"freeze_norm": 1})])
def test_two_ranks_are_one_whatever_the_batch(recipe, tmp_path, steps, fields):
    """Shares of 2 and 3 windows, read ahead by threads; norms that learn from all five, and frozen ones.

    Norms that learn make rounding grow from step to step, whatever the ranks: one step shows what there is to see.
    """
    made = fields | SHORT | {"batch": 5, "epoch_windows": 5 * steps, "optimiser.lr": 2e-3}
    one = train(recipe(**made, ranks=1), tmp_path / "one")
    with workers_with(2, read_by_threads) as spec:
        two = train(recipe(**made, ranks=2), tmp_path / "two", cluster=spec)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    begun = fit._begin(recipe(**made))
    learnt = [name for name, _ in begun.named_parameters()]
    # With every rank's mean weighing the same they would be apart by more than half of what was learnt.
    assert apart(a, b, learnt) < 0.05 * apart(a, begun.state_dict(), learnt)
    for key in a.keys() - set(learnt):
        assert torch.allclose(a[key].float(), b[key].float(), rtol=5e-3, atol=1e-3), key
    assert one.validation_g_iou == pytest.approx(two.validation_g_iou, abs=1e-3)


@pytest.mark.slow
def test_ranks_without_a_window_of_the_validation_wait_for_the_others(recipe, tmp_path):
    made = SHORT | {"batch": 3, "epoch_windows": 3, "window_px": 128, "optimiser.lr": 1e-6}
    still = StillWindows(
        recipe(**made).view(), lay_split(recipe(**made), split_recipe(recipe(**made)).validation, "roads", tmp_path)
    )
    assert len(still) == 2
    one = train(recipe(**made, ranks=1), tmp_path / "one")
    three = train(recipe(**made, ranks=3), tmp_path / "three")
    assert one.validation_g_iou == pytest.approx(three.validation_g_iou, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(recipe, tmp_path, victim):
    made = recipe(stages=[{"epochs": 60}], ranks=2)
    killed = []

    def kill_one():
        while not (tmp_path / "run/stage-0/last.ckpt").is_file():
            time.sleep(0.05)
        workers = sorted(p.pid for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline()))
        killed.append((workers, time.monotonic()))
        os.kill(workers[victim], signal.SIGKILL)

    watcher = threading.Thread(target=kill_one, daemon=True)
    watcher.start()
    with pytest.raises(ClusterLostError, match=r"^training: the worker of rank [01] was lost .*; run the same command again"):
        train(made, tmp_path / "run")
    ((workers, at),) = killed
    assert len(workers) == 2
    assert time.monotonic() - at < 60
    assert not any(map(psutil.pid_exists, workers)), "the other one has ended"
    assert not (tmp_path / "run/done.json").exists(), "it was under way"
    train(made, tmp_path / "run")
    assert (tmp_path / "run/log/stage-0/metrics-0.csv").is_file()


def diverge_on_rank_1(mark):
    """On a worker: one rank fails, the other waits for it."""
    step = RoadModule.training_step

    def fails(module, batch, number):
        if module.global_rank == 1 and module.global_step == 1:
            Path(mark).touch()
            raise DivergedError("step 1: the loss is not finite")
        return step(module, batch, number)

    RoadModule.training_step = fails


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_with_its_own_error(recipe, tmp_path):
    with workers_with(2, diverge_on_rank_1, str(tmp_path / "failed")) as spec:
        with pytest.raises(DivergedError, match="step 1: the loss is not finite"):
            train(recipe(stages=[{"epochs": 60}], ranks=2), tmp_path / "run", cluster=spec)
        assert time.time() - (tmp_path / "failed").stat().st_mtime < 60
        with Client(spec.kind) as client:
            assert not any(client.processing().values()), "nobody waits any more"


def two_gpus():
    """In this process, or on a worker: the driver lists two GPUs."""
    cluster_module._count_driver_gpus = lambda: 2


@pytest.mark.slow
def test_a_training_takes_as_many_ranks_as_there_are_gpus(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster_module, "_count_driver_gpus", lambda: 2)
    asked, real = [], fit.run_ranks
    monkeypatch.setattr(fit, "run_ranks", lambda client, ranks, *others: asked.append(ranks) or real(client, ranks, *others))
    train(recipe(**SHORT), tmp_path / "run")
    assert asked == [2]
    train(recipe(**SHORT, batch=1), tmp_path / "one")
    assert asked == [2], "a batch of one window cannot be shared"


@pytest.mark.slow
def test_a_comparison_gives_each_run_the_gpu_of_its_worker(city, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster_module, "_count_driver_gpus", lambda: 2)
    path = city.root.parent / "gpus.yaml"
    path.write_text(yaml.safe_dump(TINY | {"stages": [{"epochs": 1}]}))
    with open_cluster(ClusterSpec()) as client:
        client.run(two_gpus)
        made = compare(path, {"seed": [1, 2]}, tmp_path / "out", client)
    assert len(made.runs) == 2


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def windows(recipe, tmp_path):
    made = recipe(batch=3, epoch_windows=30)
    return made, TrainingWindows(made, lay_split(made, split_recipe(made).train, "roads", tmp_path), 0)


def equal(a: Batch, b: Batch):
    tensors = [(getattr(a, k), getattr(b, k)) for k in ("image", "label", "sample", "place", "sums", "key", "tile")]
    draws = [(getattr(a.draws, k), getattr(b.draws, k)) for k in vars(a.draws)]
    return all(torch.equal(x, y) for x, y in tensors + draws)


def test_batches_read_ahead_are_those_that_are_read_when_asked_for(windows):
    made, drawn = windows
    plain, ahead = (list(BatchLoader(drawn, WindowOrder(made, lambda: 0), readers, False)) for readers in (0, 3))
    assert len(plain) == len(ahead) == 10
    assert all(map(equal, plain, ahead))


def test_reading_ahead_is_bounded_and_ends_with_the_loop(windows):
    made, drawn = windows
    read = []

    class Watched:
        def __getitem__(self, number):
            read.append(number)
            return drawn[number]

    batches = iter(BatchLoader(Watched(), WindowOrder(made, lambda: 0), 2, False))
    next(batches)
    batches.close()
    assert len(read) <= 9, "the batch that was taken and one for each reader"
    assert not [t for t in threading.enumerate() if t.name.startswith("windows")]


def test_an_error_of_a_reader_reaches_the_loop(windows):
    made, _ = windows

    class Broken:
        def __getitem__(self, number):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(BatchLoader(Broken(), WindowOrder(made, lambda: 0), 2, False))


def test_every_tensor_of_a_batch_is_pinned(windows, monkeypatch):
    made, drawn = windows
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = next(iter(BatchLoader(drawn, WindowOrder(made, lambda: 0), 0, True)))
    assert len(pinned) == 7 + len(vars(batch.draws))
    assert equal(batch, next(iter(BatchLoader(drawn, WindowOrder(made, lambda: 0), 0, False))))
    assert isinstance(batch.draws, Draws)
