"""A device without room: one map is made by batches of one size, and what was measured is given back."""

import gc
import json
import weakref

import pytest
import torch

from roadfuse_core.cubes import ingest
from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import Block
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _calibrate as calibrating
from roadfuse_core.inference import _predictor as predictors
from roadfuse_core.inference import infer, plan_refresh
from tests.unit.test_changes import assert_equal_to_a_full_one, city, gated, write_dump  # noqa: F401

Network = predictors.NetworkPredictor


@pytest.fixture
def forward(monkeypatch):
    """The forward pass, whose answers depend on the size of the batch as they may on a GPU; fails beyond a limit."""
    real, limit, seen = Network._forward, {"windows": 99, "failures": 99}, []

    def by_size(self, inputs):
        n = len(next(iter(inputs.values())))
        seen.append(n)
        if n > limit["windows"] and limit["failures"]:
            limit["failures"] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return (real(self, inputs) + 0.02 * n) % 1

    monkeypatch.setattr(Network, "_forward", by_size)
    blocks_module.predictor_of.cache_clear()
    yield limit, seen
    blocks_module.predictor_of.cache_clear()


def test_after_a_batch_was_halved_an_incremental_map_equals_a_full_one(city, forward):
    limit, seen = forward
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    ingest(city, [write_dump(city, "corner", Block(0, 0, 60, 60))])
    limit["windows"] = 2
    record = infer(city)
    assert (record["batch"], record["why_full"]) == (2, "changed: batch")
    limit["windows"] = 99  # there is room again, and the map stays one of a single size
    assert_equal_to_a_full_one(city)
    ingest(city, [write_dump(city, "middle", Block(200, 300, 230, 330), seed=1)])
    seen.clear()
    assert not infer(city)["full"]
    assert set(seen) == {2}
    assert_equal_to_a_full_one(city)


def test_a_device_that_has_room_when_it_is_tidied_keeps_its_batch(city, forward, monkeypatch):
    limit, _ = forward
    tidied = []
    ingest(city, ["dumps/2026-03-29.parquet"])
    plan_refresh(city)
    monkeypatch.setattr(predictors, "free_memory", lambda: tidied.append(True))
    limit |= {"windows": 3, "failures": 1}
    assert infer(city)["batch"] == 4
    assert tidied == [True]


def test_a_batch_that_never_fits_is_one_line(city, forward):
    limit, _ = forward
    ingest(city, ["dumps/2026-03-29.parquet"])
    limit["windows"] = 2
    with pytest.raises(ConfigError, match=r"^model\.batch: 4 does not fit the memory of cpu-.*; lower model\.batch$"):
        infer(city)
    limit["windows"] = 0
    for chosen in ({"batch": None}, {"batch": 1}):
        small = city.model_copy(update={"model": city.model.model_copy(update=chosen)})
        with pytest.raises(ConfigError, match=r"^model\.batch: (None|1) does not fit"):
            plan_refresh(small)


def test_measuring_leaves_no_network_behind(city, monkeypatch):
    ingest(city, ["dumps/2026-03-29.parquet"])
    auto = city.model_copy(update={"model": city.model.model_copy(update={"batch": None, "precision": "auto"})})
    loaded, freed = [], []
    real = calibrating.load_predictor

    def load(*asked):
        made = real(*asked)
        loaded.append(weakref.ref(made.network))
        return made

    monkeypatch.setattr(calibrating, "load_predictor", load)
    monkeypatch.setattr(calibrating, "_has_bf16", lambda: True)
    monkeypatch.setattr(calibrating, "free_memory", lambda: freed.append(gc.collect()))
    plan_refresh(auto)
    assert len(loaded) == 3
    assert len(freed) == 1
    assert [network() for network in loaded] == [None] * 3


@pytest.mark.parametrize("left", ["", "{", "null", '{"batch": 3}', "\x00" * 90])
def test_a_damaged_measurement_is_made_again(city, left):
    ingest(city, ["dumps/2026-03-29.parquet"])
    before = plan_refresh(city).calibration
    (path,) = (city.workspace_path / "calibration").glob("*.json")
    path.write_text(left)
    assert plan_refresh(city).calibration.batch == before.batch
    assert json.loads(path.read_text())["record"]["batch"] == before.batch


def test_kernels_are_deterministic_while_a_map_is_made_and_as_before_after_it(city, monkeypatch):
    ingest(city, ["dumps/2026-03-29.parquet"])
    flags, real, cudnn = set(), Network._forward, torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)

    def looks(self, inputs):
        flags.add((cudnn.deterministic, cudnn.benchmark))
        return real(self, inputs)

    monkeypatch.setattr(Network, "_forward", looks)
    infer(city)
    assert flags == {(True, False)}
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
