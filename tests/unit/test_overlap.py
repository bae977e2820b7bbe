"""Cutting, computing and adding windows overlap, in any number of threads, and the same bytes come out."""

import threading

import numpy as np
import pytest
import torch

from roadfuse_core.grid import Block, Lattice
from roadfuse_core.inference import MapReader, infer
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _plan as planning
from roadfuse_core.mosaic import Accumulator
from tests.unit.test_incremental import Uneven, write_city


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_city(tmp_path_factory.mktemp("overlap"), 64)


@pytest.fixture
def predict_with(monkeypatch):
    """A predictor for windows of 96 px in batches of 3, in blocks of 320 px, with some threads of each kind."""

    def install(predictor, threads):
        monkeypatch.setattr(blocks_module, "predictor_of", lambda ref, resolution_m: predictor)
        monkeypatch.setattr(planning, "read_facts", lambda ref, resolution_m: predictor)
        monkeypatch.setattr(planning, "BLOCK_PX", 320)
        monkeypatch.setattr(planning, "threads_of_worker", lambda spec: threads)

    return install


def arrays(city, group):
    reader = MapReader(city, group)
    return {name: reader.window(name, 0, 0, *city.make_grid().shape) for name in reader.arrays}


def test_any_number_of_threads_makes_the_same_map(made, predict_with, monkeypatch):
    predict_with(Uneven(96), 1)
    infer(made, group="one", full=True)
    names, real = set(), Accumulator.add

    def watched(self, *a):
        names.add(threading.current_thread().name)
        real(self, *a)

    monkeypatch.setattr(Accumulator, "add", watched)
    predict_with(Uneven(96), 3)
    infer(made, group="three", full=True)
    assert len({name for name in names if name.startswith("adder-")}) == 3
    expected, got = arrays(made, "one"), arrays(made, "three")
    assert all(np.array_equal(expected[name], got[name]) for name in expected)


class Asynchronous(Uneven):
    """Begins a batch and answers only when the next one has begun: whoever waits for each batch waits for ever."""

    def __init__(self, window_px):
        super().__init__(window_px)
        self.begun, self.last, self.lock = 0, False, threading.Condition()
        self.threads = set()

    def begin(self, inputs):
        with self.lock:
            self.begun += 1
            mine = self.begun
            self.lock.notify_all()
        answer = self.predict(inputs)
        self.threads.add(threading.current_thread().name)

        def wait():
            with self.lock:
                assert self.lock.wait_for(lambda: self.begun > mine or self.begun == self.expected, timeout=60), (
                    "it was waited for"
                )
            return answer

        return wait


def test_no_batch_is_waited_for_before_the_next_has_begun(made, predict_with, monkeypatch):
    predict_with(Uneven(96), 2)
    infer(made, group="plain", full=True)
    predictor = Asynchronous(96)
    predict_with(predictor, 2)
    monkeypatch.setattr(planning, "BLOCK_PX", 1024)  # one block, so that every batch but the last has a next one
    plan = planning.plan_refresh(made, group="begun", full=True)
    predictor.expected = -(-plan.windows // plan.calibration.batch)
    assert infer(made, group="begun", full=True)["windows"] == plan.windows
    assert predictor.begun == predictor.expected
    assert len(predictor.threads) == 1, "one thread talks to the device"
    expected, got = arrays(made, "plain"), arrays(made, "begun")
    assert all(np.array_equal(expected[name], got[name]) for name in expected)


def test_windows_are_cut_in_several_threads_into_full_batches(made, predict_with):
    """And no batch keeps anything of the one before."""
    seen = []

    class Looks(Uneven):
        def predict(self, inputs):
            seen.append({name: x.clone() for name, x in inputs.items()})
            return super().predict(inputs)

    for threads in (1, 4):
        predict_with(Looks(96), threads)
        infer(made, group=f"cut-{threads}", full=True)
    half = len(seen) // 2
    assert len(seen) == 2 * half
    for one, four in zip(seen[:half], seen[half:], strict=True):
        assert one.keys() == four.keys()
        assert all(torch.equal(one[name], four[name]) for name in one)
        assert {len(x) for x in four.values()} == {3}


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_shares_of_a_window_add_up_to_the_window(shares):
    rng, lattice = np.random.default_rng(0), Lattice(96, 32)
    whole, parts = (Accumulator(Block(-7, 5, 300, 250), 2) for _ in range(2))
    for row, col in ((-7, 5), (-1, 40), (100, 120), (203, 153)):
        planes, known = rng.random((2, 96, 96), dtype=np.float32), rng.random((96, 96)) < 0.7
        whole.add(row, col, planes, lattice.weight() * known)
        for share in range(shares):
            parts.add(row, col, planes, lattice.weight(), known, (share, shares))
    assert np.array_equal(whole.sums, parts.sums)
    assert whole.sums.any()


def test_a_fault_in_a_helping_thread_is_a_fault_of_the_block(made, predict_with, monkeypatch):
    from roadfuse_core.inference import IncompleteError

    def fails(self, *a):
        raise RuntimeError("a fault in an adder")

    predict_with(Uneven(96), 2)
    monkeypatch.setattr(Accumulator, "add", fails)
    with pytest.raises(IncompleteError, match="a fault in an adder"):
        infer(made, group="faulty", full=True)
