"""On a machine with GPUs, work that none of them helps has all its cores; GPUs are made up, clusters are real."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flows import cli
from flows import refresh as flow
from roadfuse_core import cluster
from roadfuse_core.cluster import count_workers, on_cores, open_cluster, open_cores
from roadfuse_core.metrics import Verdict
from roadfuse_core.settings import ClusterSpec


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster, "_count_driver_gpus", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def of(city, **spec):
    return city.model_copy(update={"cluster": ClusterSpec(**spec)})


@pytest.mark.parametrize("spec", [{}, {"kind": "cuda"}, {"workers": 1, "memory_gib": 64}])
def test_a_city_on_gpus_has_all_cores_for_its_points(small_city, one_gpu, spec):
    city = of(small_city, **spec)
    assert count_workers(city.cluster) == 1
    assert on_cores(city).cluster == ClusterSpec(kind="local")
    assert count_workers(on_cores(city).cluster) == 3


@pytest.mark.parametrize("spec", [{"kind": "local"}, {"kind": "tcp://10.0.0.1:8786"}])
def test_a_cluster_that_is_stated_stays(small_city, one_gpu, spec):
    city = of(small_city, **spec)
    assert on_cores(city) is city


def test_without_gpus_there_is_one_cluster(small_city, monkeypatch):
    monkeypatch.setattr(cluster, "_count_driver_gpus", lambda: 0)
    with open_cluster(ClusterSpec(workers=1)) as client, open_cores(small_city, client) as cores:
        assert cores is client


def test_beside_gpus_there_is_a_cluster_of_all_cores(small_city, one_gpu):
    with open_cluster(ClusterSpec()) as client, open_cores(small_city, client) as cores:
        assert len(client.scheduler_info()["workers"]) == 1
        assert len(cores.scheduler_info()["workers"]) == 3
        assert set(cores.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).values()) == {""}


def test_an_ingest_from_the_command_line_runs_on_all_cores(small_city, one_gpu, monkeypatch):
    specs = []
    real = cluster.open_cluster

    def watched(spec):
        specs.append(spec)
        return real(spec)

    monkeypatch.setattr(cluster, "open_cluster", watched)
    text = (small_city.root / "city.yaml").read_text()
    assert "cluster:" not in text or "kind: auto" in text or "kind" not in text
    done = CliRunner().invoke(cli.app, ["ingest", str(small_city.root / "city.yaml")])
    assert done.exit_code == 0, done.output
    assert specs == [ClusterSpec(kind="local")]


def test_the_stages_of_a_refresh_run_where_they_belong(small_city, one_gpu, monkeypatch):
    """Points and scores on the cores, the map on the GPU; stages only tell where they were sent."""
    seen, closed = {}, []

    @contextmanager
    def opened(city_or_spec, client=None):
        name = "cores" if client else "gpus"
        yield SimpleNamespace(scheduler_info=lambda n_workers: {"address": name, "workers": {}}, dashboard_link=None)
        closed.append(name)

    def stage(name, result):
        def run(city_file, *a, **k):
            seen[name] = a[0] if a and isinstance(a[0], str) else None
            return result

        return run

    for name, result in (("ingest_dumps", None), ("predict", {"failed": []}), ("score", SimpleNamespace(subsets={})),
                         ("tune_baseline", None), ("export_maps", {}), ("report", None), ("remember", None)):  # fmt: skip
        monkeypatch.setattr(flow.stages, name, stage(name, result))
    monkeypatch.setattr(flow, "open_cluster", opened)
    monkeypatch.setattr(flow, "open_cores", opened)
    monkeypatch.setattr(flow.artifacts, "summarise", lambda *a: None)
    flow._refresh(small_city, small_city.root / "city.yaml", False, False, False, flow.Stopwatch())
    assert (seen["ingest_dumps"], seen["predict"], seen["score"]) == ("cores", "gpus", "cores")
    assert closed == ["cores", "gpus"]
    assert Verdict(()).passed
