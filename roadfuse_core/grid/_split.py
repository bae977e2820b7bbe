"""Training, validation and test tiles: disjoint in space, the same for everyone who asks."""

from __future__ import annotations

import hashlib

from roadfuse_core.grid._grid import Grid, TileIndex

__all__ = ["SPLITS", "split_tiles"]

SPLITS = ("train", "validation", "test")
SHARES = (0.7, 0.1, 0.2)


def split_tiles(grid: Grid, seed: int = 0) -> dict[TileIndex, str]:
    """Each tile's split, 70 / 10 / 20 as in Sun et al. 2019.

    Tiles are ranked by a hash of their place on the CRS's lattice and of the seed, so that the split neither
    depends on the order of work nor on the machine; a grid of at least five tiles has a test tile.

    Args:
        grid: The city's grid.
        seed: Another seed, another split.

    Returns:
        "train", "validation" or "test" for every tile.
    """
    ranked = sorted(grid.tiles(), key=lambda t: _rank(grid.left_tile + t.col, grid.top_tile - t.row, seed))
    n_test = round(SHARES[2] * len(ranked))
    n_validation = round(SHARES[1] * len(ranked))
    names = ["test"] * n_test + ["validation"] * n_validation
    names += ["train"] * (len(ranked) - len(names))
    return dict(zip(ranked, names, strict=True))


def _rank(x: int, y: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{x}:{y}".encode(), digest_size=8).digest()
