"""Which process works on which GPU; the driver's answer is made up, everything behind it is real."""

import os

import pytest

from roadfuse_core import cluster
from roadfuse_core.cluster import count_gpus, count_workers, default_ranks, open_cluster
from roadfuse_core.errors import ConfigError
from roadfuse_core.settings import ClusterSpec


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster, "_count_driver_gpus", lambda: 2)


def seen() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("visible", "there", "found"),
    [(None, 0, 0), (None, 3, 3), ("", 3, 0), ("-1", 3, 0), ("2", 3, 1), ("2, 0", 3, 2), ("0", 0, 0)],
)
def test_gpus_are_those_of_the_driver_that_the_environment_leaves(monkeypatch, visible, there, found):
    monkeypatch.setattr(cluster, "_count_driver_gpus", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == found


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, {"0,1", "1,0"}), ("3,GPU-8932f937", {"3,GPU-8932f937", "GPU-8932f937,3"})]
)
def test_every_worker_has_a_gpu_of_its_own(two_gpus, monkeypatch, visible, expected):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with open_cluster(ClusterSpec()) as client:
        assert set(client.run(seen).values()) == expected
    assert count_workers(ClusterSpec()) == 2


def test_local_workers_leave_the_gpus_alone(two_gpus):
    with open_cluster(ClusterSpec(kind="local", workers=3)) as client:
        assert list(client.run(seen).values()) == ["", "", ""]


def test_a_machine_without_gpus_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(cluster, "_count_driver_gpus", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with open_cluster(ClusterSpec(workers=1)) as client:
        assert list(client.run(seen).values()) == ["0"]


def test_more_workers_than_gpus_is_one_clear_line(two_gpus):
    with pytest.raises(ConfigError) as error, open_cluster(ClusterSpec(workers=3)):
        pass
    assert str(error.value) == (
        "cluster.workers: 3 exceeds this machine's GPUs, of which there are 2; leave it out for one worker a GPU, or set "
        "cluster.kind: local for workers without GPUs"
    )


def test_gpus_that_are_asked_for_and_not_there_are_one_clear_line(monkeypatch):
    monkeypatch.setattr(cluster, "_count_driver_gpus", lambda: 0)
    with (
        pytest.raises(ConfigError, match=r"^cluster\.kind: 'cuda' finds no GPU; check nvidia-smi"),
        open_cluster(ClusterSpec(kind="cuda")),
    ):
        pass


def test_a_worker_has_one_rank_and_a_machine_one_a_gpu(two_gpus):
    assert default_ranks() == 2
    with open_cluster(ClusterSpec(workers=1)) as client:
        assert client.submit(default_ranks).result() == 1
        assert client.submit(count_gpus).result() == 0, "the driver of the test is not that of its worker"
