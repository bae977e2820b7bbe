"""Recall on arterials and road on buildings for the refreshed Austin city: python tests/real/measure_austin.py DATA.

Arterials are the shapes of bus routes (GTFS) without route 550, which is a train; buildings a mask of 0.3 m. All is
measured inside the aerial tile alone.
"""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import rasterio
from pyproj import Transformer
from rasterio.vrt import WarpedVRT
from scipy import ndimage

from roadfuse_core.inference import MapReader
from roadfuse_core.settings import load_city

TILE = (622_500, 3_349_500, 624_000, 3_351_000)


def arterials(archive: Path, crs: str) -> np.ndarray:
    """(n, 2) places a metre apart along the shapes."""
    to_grid = Transformer.from_crs(4326, crs, always_xy=True)
    out = []
    with zipfile.ZipFile(archive) as z:
        for name in z.namelist():
            if "/shapes_" not in name or "/shapes_550_" in name:
                continue
            points = json.loads(z.read(name))
            xy = np.stack(to_grid.transform(*([float(p[k]) for p in points] for k in ("shape_pt_lon", "shape_pt_lat"))), 1)
            for a, b in zip(xy[:-1], xy[1:], strict=True):
                n = max(2, int(np.hypot(*(b - a))))
                out.append(a + np.linspace(0, 1, n)[:, None] * (b - a))
    places = np.concatenate(out)
    inside = (places >= TILE[:2]).all(1) & (places < TILE[2:]).all(1)
    return np.unique(np.floor(places[inside]), axis=0) + 0.5


def main() -> None:
    """Print the figures."""
    data = Path(sys.argv[1])
    city = load_city(Path(__file__).with_name("austin.yaml"))
    grid = city.make_grid()
    road = MapReader(city).window("road", 0, 0, *grid.shape) == 1
    col, row = (np.arange(n) + 0.5 for n in grid.shape[::-1])
    x, y = grid.bounds.left + col * grid.resolution_m, grid.bounds.top - row * grid.resolution_m
    tile = np.outer((y >= TILE[1]) & (y < TILE[3]), (x >= TILE[0]) & (x < TILE[2]))
    with rasterio.open(data / "austin/inria_austin29_gt_buildings_5000px.png") as source:
        placed = rasterio.Affine(0.3, 0, TILE[0], 0, -0.3, TILE[3])
        with WarpedVRT(source, src_crs="EPSG:26914", src_transform=placed, crs=grid.crs, transform=grid.affine,
                       height=grid.shape[0], width=grid.shape[1]) as vrt:  # fmt: skip
            buildings = vrt.read(1) > 0
    places = arterials(data / "austin/instabus_gtfs_shapes_2016-06.zip", grid.crs)
    c, r = (np.floor(v).astype(int) for v in ~grid.affine @ (places[:, 0], places[:, 1]))
    far = ndimage.distance_transform_edt(~road) * grid.resolution_m
    print(
        f"arterials: {len(places):,} m; within 5 m of predicted road {np.mean(far[r, c] <= 5):.3f}, on it {np.mean(far[r, c] == 0):.3f}"
    )
    print(f"predicted road on buildings: {(road & tile & buildings).sum() / (road & tile).sum():.4f}")
    print(
        f"tile predicted as road: {(road & tile).sum() / tile.sum():.4f}; buildings cover {(buildings & tile).sum() / tile.sum():.4f}"
    )


if __name__ == "__main__":
    main()
