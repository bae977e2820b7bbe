"""Pure geometry: the city's grid, its tiles, the way from coordinates to pixels, the window lattice."""

from roadfuse_core.grid._grid import Bounds, Grid, TileIndex, make_grid, tiles_near
from roadfuse_core.grid._ground import ground_metres, pixel_metres
from roadfuse_core.grid._lattice import Block, Lattice, blocks_of
from roadfuse_core.grid._projection import PixelProjection, fit_projection
from roadfuse_core.grid._split import (
    SPLITS,
    ImpliedSplit,
    SplitRule,
    TaughtCity,
    imply_split,
    split_by,
    split_tiles,
    taught_near,
    tiles_learnt,
)

__all__ = [
    "SPLITS",
    "Block",
    "Bounds",
    "Grid",
    "ImpliedSplit",
    "Lattice",
    "PixelProjection",
    "SplitRule",
    "TaughtCity",
    "TileIndex",
    "blocks_of",
    "fit_projection",
    "ground_metres",
    "imply_split",
    "make_grid",
    "pixel_metres",
    "split_by",
    "split_tiles",
    "taught_near",
    "tiles_learnt",
    "tiles_near",
]
