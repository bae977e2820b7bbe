"""Blending laws: exact, order-free, constant in and constant out."""

import contextlib
import tempfile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from roadfuse_core.grid import Block, Lattice
from roadfuse_core.inference._blocks import region_of
from roadfuse_core.mosaic import NODATA, PROBABILITY_SCALE, Accumulator, to_probability


def _windows(seed, n=9, size=32):
    rng = np.random.default_rng(seed)
    return [(int(r), int(c), rng.random((size, size), np.float32)) for r, c in rng.integers(0, 32, (n, 2))]


@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_order_does_not_matter(seed, shuffler):
    windows, weight = _windows(seed), Lattice(32, 16).weight()
    forward, backward = Accumulator(Block(0, 0, 64, 64)), Accumulator(Block(0, 0, 64, 64))
    for r, c, p in windows:
        forward.add(r, c, p[None], weight)
    shuffler.shuffle(windows)
    for r, c, p in windows:
        backward.add(r, c, p[None], weight)
    assert np.array_equal(forward.sums, backward.sums)


@given(st.floats(0, 1, width=32), st.sampled_from([8, 16, 32]))
def test_a_constant_stays_constant(value, stride):
    lattice = Lattice(32, stride)
    out = Accumulator(Block(-32, -32, 96, 96))
    for r in range(-32, 65, stride):
        for c in range(-32, 65, stride):
            out.add(r, c, np.full((1, 32, 32), value, np.float32), lattice.weight())
    inner = to_probability(out.sums)[0, 32:96, 32:96]
    assert inner.min() == inner.max()
    assert abs(inner[0, 0] - value * PROBABILITY_SCALE) <= 0.51


def test_blending_equals_plain_float_arithmetic_to_rounding():
    windows, weight = _windows(5), Lattice(32, 16).weight()
    out, value, total = Accumulator(Block(0, 0, 64, 64)), np.zeros((64, 64)), np.zeros((64, 64))
    for r, c, p in windows:
        out.add(r, c, p[None], weight)
        value[r : r + 32, c : c + 32] += p.astype(float) * weight
        total[r : r + 32, c : c + 32] += weight
    got = to_probability(out.sums)[0].astype(int)
    seen = total > 0
    assert (got[~seen] == NODATA).all()
    assert np.abs(got[seen] - value[seen] / total[seen] * PROBABILITY_SCALE).max() <= 0.51


def test_sixteen_overlaps_do_not_overflow():
    out = Accumulator(Block(0, 0, 32, 32))
    for _ in range(16):
        out.add(0, 0, np.ones((1, 32, 32), np.float32), np.full((32, 32), 4095, np.uint32))
    assert (to_probability(out.sums) == PROBABILITY_SCALE).all()
    assert Lattice(256, 64).weight().max() <= 4095


@given(st.sampled_from([64, 128, 256]), st.sampled_from([1, 2, 4]))
def test_weights_are_positive_and_symmetric(size, overlap):
    w = Lattice(size, size // overlap).weight()
    assert w.min() >= 1
    assert np.array_equal(w, w[::-1])
    assert np.array_equal(w, w.T)


@given(st.integers(0, 10_000), st.sampled_from([(32, 16), (32, 8), (24, 8), (32, 32)]), st.sampled_from([32, 48, 64, 100]))
def test_what_blocks_leave_makes_the_same_mosaic_as_one_rectangle(seed, sizes, step):
    """Any block size, also where it is no multiple of the stride: finished middles and edge sums against one accumulator."""
    lattice, height, width = Lattice(*sizes), 100, 130
    rng = np.random.default_rng(seed)
    weight, size = lattice.weight(), lattice.window_px
    windows = {
        p: rng.random((2, size, size), np.float32) for p in lattice.windows(Block(0, 0, height, width)) if rng.random() < 0.7
    }
    one = Accumulator(Block(0, 0, height, width), 2)
    pad = Accumulator(Block(-size, -size, height + size, width + size), 2)
    for (r, c), p in windows.items():
        pad.add(r, c, p, weight)
    one.sums[:] = pad.sums[:, size : size + height, size : size + width]
    blocks = [
        Block(r, c, min(r + step, height), min(c + step, width)) for r in range(0, height, step) for c in range(0, width, step)
    ]
    left = []
    for block in blocks:
        region = region_of(lattice, block)
        own = Accumulator(region, 2)
        for place in lattice.windows(block):
            if place in windows:
                own.add(*place, windows[place], weight)
        left.append(own.parts(lattice))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        for k, parts in enumerate(left):
            save_file({n: np.ascontiguousarray(x) for n, x in parts.items()}, f"{folder}/{k}")
        opened = [files.enter_context(safe_open(f"{folder}/{k}", "np")) for k in range(len(left))]
        for block in blocks:
            expected = to_probability(one.sums[:, block.row0 : block.row1, block.col0 : block.col1])
            assert np.array_equal(Accumulator(block, 2).values(opened), expected)
