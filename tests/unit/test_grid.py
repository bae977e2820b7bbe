"""Laws of the grid, the projection, the lattice and the split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer

from roadfuse_core.errors import ConfigError
from roadfuse_core.grid import (
    SPLITS,
    Block,
    Bounds,
    Grid,
    Lattice,
    TileIndex,
    blocks_of,
    fit_projection,
    make_grid,
    split_tiles,
)
from roadfuse_core.grid._projection import cubic, horner

grids = st.builds(
    Grid,
    crs=st.just("EPSG:32633"),
    resolution_m=st.sampled_from([0.3, 0.5, 1.0, 2.5]),
    tile_px=st.sampled_from([64, 256, 1024]),
    left_tile=st.integers(-50, 3000),
    top_tile=st.integers(-50, 9000),
    tiles_y=st.integers(1, 9),
    tiles_x=st.integers(1, 9),
)


@given(grids, st.data())
def test_tile_to_bounds_to_tile_is_identity(grid, data):
    tile = TileIndex(data.draw(st.integers(0, grid.tiles_y - 1)), data.draw(st.integers(0, grid.tiles_x - 1)))
    b = grid.tile_bounds(tile)
    inside = Bounds(b.left + 0.01, b.bottom + 0.01, b.right - 0.01, b.top - 0.01)
    assert grid.tiles_covering(inside) == [tile]


@given(grids, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_each_pixel_lies_in_exactly_one_tile(grid, u, v):
    row, col = int(u * grid.shape[0]), int(v * grid.shape[1])
    x, y = grid.affine @ (col + 0.5, row + 0.5)
    holders = [t for t in grid.tiles() if _holds(grid.tile_bounds(t), x, y)]
    assert holders == [TileIndex(row // grid.tile_px, col // grid.tile_px)]


def _holds(b, x, y):
    return b.left <= x < b.right and b.bottom < y <= b.top


def test_tiles_that_only_touch_do_not_count():
    grid = Grid("EPSG:32633", 1.0, 64, 0, 4, 4, 4)
    assert grid.tiles_covering(Bounds(64, 64, 128, 128)) == [TileIndex(2, 1)]
    assert grid.tiles_covering(Bounds(64, 64, 64, 128)) == []
    assert len(grid.tiles_covering(Bounds(-9, -9, 999, 999))) == 16


@given(st.floats(-0.02, 0.02), st.floats(-0.02, 0.02))
def test_grids_of_one_city_line_up(dx, dy):
    one = make_grid(Bounds(13.0, 47.0, 13.1, 47.1), crs="EPSG:32633")
    other = make_grid(Bounds(13.0 + dx, 47.0 + dy, 13.1 + dx, 47.1 + dy), crs="EPSG:32633")
    for a, b in ((one.bounds.left, other.bounds.left), (one.bounds.top, other.bounds.top)):
        assert (a - b) % one.tile_m == 0


def test_a_grid_covers_its_bounds_in_the_zone_of_its_centre():
    box = Bounds(23.70, 37.95, 23.76, 38.00)
    grid = make_grid(box)
    assert grid.crs == "EPSG:32634"
    x0, y0, x1, y1 = Transformer.from_crs(4326, grid.crs, always_xy=True).transform_bounds(*box)
    b = grid.bounds
    assert b.left <= x0 < b.left + grid.tile_m
    assert b.right - grid.tile_m < x1 <= b.right
    assert b.bottom <= y0 < b.bottom + grid.tile_m
    assert b.top - grid.tile_m < y1 <= b.top


def test_degrees_are_no_grid():
    with pytest.raises(ConfigError, match=r"grid\.crs.*not a projected CRS"):
        make_grid(Bounds(0, 0, 1, 1), crs="EPSG:4326")


# 60 km at the edge of a UTM zone, the southern hemisphere, high latitude, and a source that is projected itself.
CITIES = {
    "zone edge": (Bounds(17.55, 52.0, 18.42, 52.54), "EPSG:32633", "EPSG:4326"),
    "south": (Bounds(-46.95, -23.9, -46.3, -23.35), None, "EPSG:4326"),
    "high": (Bounds(17.5, 69.3, 19.0, 69.85), None, "EPSG:4326"),
    "Greek grid": (Bounds(23.5, 37.8, 24.0, 38.2), None, "EPSG:2100"),
    "next zone": (Bounds(17.55, 52.0, 18.42, 52.54), "EPSG:32633", "EPSG:32634"),
}


@pytest.mark.parametrize("name", CITIES)
def test_projection_stays_within_its_bound_of_proj(name):
    box, crs, source = CITIES[name]
    grid = make_grid(box, 0.5, 1024, crs)
    projection = fit_projection(grid, source)
    rng = np.random.default_rng(1)
    col, row = rng.uniform(0, grid.shape[1], 200_000), rng.uniform(0, grid.shape[0], 200_000)
    back = Transformer.from_crs(grid.crs, source, always_xy=True)
    x, y = back.transform(*(grid.affine @ (col, row)))
    forth = Transformer.from_crs(source, grid.crs, always_xy=True)
    east, north = forth.transform(x, y)
    true_col, true_row = ~grid.affine @ (east, north)
    got_col, got_row = projection.pixels(x, y)
    miss = np.hypot(got_col - true_col, got_row - true_row).max()
    assert miss <= projection.error_px <= 0.01


def test_compiled_and_plain_projection_are_equal_to_the_bit():
    grid = make_grid(CITIES["zone edge"][0], crs="EPSG:32633")
    p = fit_projection(grid)
    s = p.scale()
    rng = np.random.default_rng(2)
    x, y = rng.uniform(p.box.left, p.box.right, 500), rng.uniform(p.box.bottom, p.box.top, 500)
    plain = np.stack(p.pixels(x, y))
    compiled = [[horner(a * s[0] + s[1], b * s[2] + s[3], p.coefficients, k, p.degree) for a, b in zip(x, y)] for k in (0, 1)]
    assert np.array_equal(plain, np.array(compiled))
    unrolled = [[cubic(a * s[0] + s[1], b * s[2] + s[3], p.coefficients, k) for a, b in zip(x, y)] for k in (0, 1)]
    assert p.degree == 3
    assert np.array_equal(plain, np.array(unrolled))


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_window_has_one_owner_and_every_pixel_all_its_windows(tiles_per_block, overlap, ty, tx, scale):
    grid = Grid("EPSG:32633", 1.0, 64, 0, ty, ty, tx)
    lattice = Lattice(16 * overlap * scale // scale, 16)
    owners = [w for b in blocks_of(grid, tiles_per_block) for w in lattice.windows(b)]
    assert len(owners) == len(set(owners))
    cover = np.zeros(grid.shape, int)
    for r, c in owners:
        cover[max(r, 0) : max(r + lattice.window_px, 0), max(c, 0) : max(c + lattice.window_px, 0)] += 1
    assert (cover == overlap**2).all()


def test_blocks_cut_the_grid_without_overlap():
    grid = Grid("EPSG:32633", 1.0, 64, 0, 5, 5, 3)
    cover = np.zeros(grid.shape, int)
    for b in blocks_of(grid, 2):
        cover[b.row0 : b.row1, b.col0 : b.col1] += 1
    assert (cover == 1).all()
    assert blocks_of(grid, 2)[-1] == Block(256, 128, 320, 192)


def test_strides_that_would_overflow_are_refused():
    with pytest.raises(ValueError, match="stride 32"):
        Lattice(256, 32)


@given(grids, st.integers(0, 5))
def test_split_is_a_partition_in_stated_shares(grid, seed):
    split = split_tiles(grid, seed)
    assert set(split) == set(grid.tiles())
    counts = [list(split.values()).count(s) for s in SPLITS]
    n = grid.n_tiles
    assert counts[2] == round(0.2 * n)
    assert counts[1] == round(0.1 * n)


def test_a_tile_keeps_its_rank_when_the_city_grows():
    small, large = Grid("EPSG:32633", 1.0, 64, 10, 50, 4, 4), Grid("EPSG:32633", 1.0, 64, 10, 50, 40, 4)
    a, b = split_tiles(small), split_tiles(large)
    # The hash orders tiles; the greatest of the small city can only fall behind, never overtake.
    first_small = [t for t in small.tiles() if a[t] == "test"]
    assert sum(b[t] == "test" for t in first_small) >= 1
