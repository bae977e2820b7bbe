"""Pure geometry: the city's grid, its tiles, the way from coordinates to pixels, the window lattice."""

from roadfuse_core.grid._grid import Bounds, Grid, TileIndex, make_grid
from roadfuse_core.grid._lattice import Block, Lattice, blocks_of
from roadfuse_core.grid._projection import PixelProjection, fit_projection
from roadfuse_core.grid._split import SPLITS, split_tiles

__all__ = [
    "SPLITS",
    "Block",
    "Bounds",
    "Grid",
    "Lattice",
    "PixelProjection",
    "TileIndex",
    "blocks_of",
    "fit_projection",
    "make_grid",
    "split_tiles",
]
