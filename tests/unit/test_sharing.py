"""Blocks and chains keep all cards busy; the cards are made up, the plan is the product's."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadfuse_core import cluster
from roadfuse_core.grid import Grid, Lattice, blocks_of
from roadfuse_core.inference import _run as running
from roadfuse_core.inference import plan_refresh
from roadfuse_core.inference._share import choose_block_px, finish, windows_in
from tests.unit.test_incremental import write_city


def busy(grid, lattice, windows, batch, workers, client=None):
    """Share of the cards' time in which they compute, by the blocks and chains that a refresh would make."""
    edge = choose_block_px(grid, lattice, windows, batch, workers, 4096)
    counts = windows_in(windows, lattice, blocks_of(grid, edge // grid.tile_px))
    batches = sorted((int(-(-n // batch)) for n in counts if n), reverse=True)
    plan = SimpleNamespace(windows=int(windows.sum()), calibration=SimpleNamespace(window_s=0.001))
    machine = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": dict.fromkeys(range(workers))})
    chains = running._chains(plan, batches, machine)
    assert [b for chain in chains for b in chain] == batches
    end = finish([sum(chain) for chain in chains], workers)
    return sum(batches) / (workers * end), sum(batches) * batch / windows.sum()


@pytest.mark.parametrize("batch", [8, 16, 32, 64])
@pytest.mark.parametrize("tile_px", [256, 512, 1024])
def test_eight_cards_are_busy_on_a_city_of_four_kilometres(batch, tile_px):
    """At half a metre a pixel, every window wanted."""
    side = 8192 // tile_px
    grid, lattice = Grid("EPSG:32633", 0.5, tile_px, 0, side, side, side), Lattice(256, 128)
    windows = np.ones((65, 65), bool)
    share, padding = busy(grid, lattice, windows, batch, 8)
    assert share >= 0.9
    assert padding <= 1.35


@given(
    st.integers(0, 2**32 - 1), st.sampled_from((64, 128, 256)), st.integers(1, 6),
    st.sampled_from([(64, 32), (96, 24), (224, 112), (384, 128)]),
)  # fmt: skip
def test_windows_of_blocks_are_those_that_the_lattice_gives_them(seed, tile_px, block_tiles, sizes):
    lattice, grid = Lattice(*sizes), Grid("EPSG:32633", 1.0, tile_px, 0, 20, 5, 7)
    shape = [len(lattice.starts(0, n)) for n in grid.shape]
    windows = np.random.default_rng(seed).random(shape) < 0.4
    blocks = blocks_of(grid, block_tiles)
    number = lambda at: (at + lattice.overhang_px) // lattice.stride_px  # noqa: E731
    expected = [sum(windows[number(r), number(c)] for r, c in lattice.windows(block)) for block in blocks]
    assert windows_in(windows, lattice, blocks).tolist() == expected
    assert sum(expected) == windows.sum()


def test_the_plan_of_a_machine_with_eight_cards(tmp_path, monkeypatch):
    city = write_city(tmp_path, 64)
    alone = plan_refresh(city, full=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster, "_count_driver_gpus", lambda: 8)
    plan = plan_refresh(city, full=True)
    jobs = plan.jobs(tmp_path)
    batches = [-(-int(np.unpackbits(np.frombuffer(job.wanted, np.uint8)).sum()) // plan.calibration.batch) for job in jobs]
    assert len(plan.jobs(tmp_path)) >= 8 > len(alone.jobs(tmp_path))
    assert batches == sorted(batches, reverse=True)
    assert sum(batches) / (8 * finish(batches, 8)) >= 0.66  # some thirty windows are no more than a few for each
    assert plan.seconds == pytest.approx(plan.windows * plan.calibration.window_s / 8)


def test_chains_get_shorter_so_that_all_end_together():
    plan = SimpleNamespace(windows=100_000, calibration=SimpleNamespace(window_s=0.001))
    machine = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": dict.fromkeys(range(8))})
    for n in (100, 101, 999, 4097):
        chains = running._chains(plan, list(range(n)), machine)
        end = finish([len(chain) for chain in chains], 8)
        assert n / (8 * end) >= 0.95 - 8 / n
        assert len(chains) < n or n <= 100
