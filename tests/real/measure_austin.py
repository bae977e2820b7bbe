"""Austin by image and buses, by either alone and by kernel density: python tests/real/measure_austin.py OUT [--weights NAME …].

No map of all roads comes with the tile, so this measures what can be: recall within 5 m along the arterials (shapes of bus
routes, without route 550, which is a train), the share of the predicted road that lies on buildings, and the share of the
tile that is predicted as road. A line for each network, as it is and averaged over the eight turns of a window, and a
picture: road orange, buildings blue, both yellow. Writes nothing beside OUT.
"""

import argparse
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from leave_one_out import DATA, lay
from numpy.typing import NDArray
from PIL import Image
from pyproj import Transformer
from rasterio.vrt import WarpedVRT
from scipy import ndimage

from roadfuse_core.grid import Grid
from roadfuse_core.imagery import ImageryReader, find_imagery
from roadfuse_core.inference import MapReader, infer
from roadfuse_core.settings import City

FOLDER = DATA / "austin"
REACH_M = 5


def placed(name: str, out: Path) -> Path:
    """A picture of the folder with the georeference that stands beside it."""
    where = json.loads((FOLDER / "GEOREF.json").read_text())[name]
    with rasterio.open(FOLDER / name) as source:
        bands, pixel = source.read(), where["pixel_m"]
    to_crs = rasterio.Affine(pixel, 0, where["left"], 0, -pixel, where["top"])
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    with rasterio.open(out, "w", driver="GTiff", dtype=bands.dtype, crs=where["crs"], transform=to_crs, **shape) as made:
        made.write(bands)
    return out


def on_grid(path: Path, grid: Grid) -> NDArray[np.uint8]:
    """The first band, on the pixels of the grid; and 0 past it."""
    shape = {"height": grid.shape[0], "width": grid.shape[1]}
    with rasterio.open(path) as source, WarpedVRT(source, crs=grid.crs, transform=grid.affine, **shape) as warped:
        return warped.read(1)


def arterials(grid: Grid) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of places a metre apart along the shapes of the bus routes."""
    to_grid = Transformer.from_crs(4326, grid.crs, always_xy=True)
    found = []
    with zipfile.ZipFile(FOLDER / "instabus_gtfs_shapes_2016-06.zip") as archive:
        for name in archive.namelist():
            if "/shapes_" not in name or "/shapes_550_" in name:
                continue
            points = json.loads(archive.read(name))
            xy = np.stack(to_grid.transform(*([float(p[k]) for p in points] for k in ("shape_pt_lon", "shape_pt_lat"))), 1)
            for a, b in zip(xy[:-1], xy[1:], strict=True):
                found.append(a + np.linspace(0, 1, max(2, int(np.hypot(*(b - a)))))[:, None] * (b - a))
    places = np.unique(np.floor(np.concatenate(found)), axis=0) + 0.5
    col, row = (np.floor(v).astype(int) for v in ~grid.affine @ (places[:, 0], places[:, 1]))
    inside = (row >= 0) & (row < grid.shape[0]) & (col >= 0) & (col < grid.shape[1])
    return row[inside], col[inside]


class Scene(NamedTuple):
    """What maps are held against, on the pixels of the grid: image, where it is, buildings, and places on arterials."""

    image: NDArray[np.uint8]
    tile: NDArray[np.bool_]
    buildings: NDArray[np.bool_]
    arterials: tuple[NDArray[np.intp], NDArray[np.intp]]


def look(city: City, out: Path) -> Scene:
    """Read it all."""
    grid = city.make_grid()
    image, tile = ImageryReader(city.imagery, find_imagery(city), grid).window(0, 0, *grid.shape)
    buildings = on_grid(placed("inria_austin29_gt_buildings_5000px.png", out / "buildings.tif"), grid) > 0
    row, col = arterials(grid)
    return Scene(image, tile, buildings, (row[tile[row, col]], col[tile[row, col]]))


def measure(city: City, weights: str, scene: Scene, picture: Path) -> dict[str, float]:
    """Refresh, draw and measure, inside the aerial tile alone."""
    grid = city.make_grid()
    infer(city, weights, "score", full=True)
    road = (MapReader(city, "score").window("road", 0, 0, *grid.shape) == 1) & scene.tile
    wrong = road & scene.buildings
    shown = scene.image.transpose(1, 2, 0) / 2
    for pixels, colour in ((scene.buildings, (90, 90, 255)), (road, (255, 110, 0)), (wrong, (255, 255, 0))):
        shown[pixels] = shown[pixels] * 0.5 + np.array(colour) * 0.5
    Image.fromarray(shown.astype(np.uint8)).save(picture)
    far = ndimage.distance_transform_edt(~road) * grid.resolution_m
    return {
        "arterial recall": round(float(np.mean(far[scene.arterials] <= REACH_M)), 3),
        "of road on buildings": round(float(wrong.sum() / max(1, road.sum())), 4),
        "of tile is road": round(float(road.sum() / scene.tile.sum()), 4),
    }


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", nargs="*", default=["fused", "image", "gps"], help="networks")
    a = parser.parse_args()
    out = a.out.resolve()
    (out / "work/austin").mkdir(parents=True, exist_ok=True)
    placed("inria_austin29_1024px.png", out / "work/austin/aerial.tif")  # where austin.yaml says
    city = lay(out, "austin")
    scene = look(city, out)
    turned = city.model_copy(update={"model": city.model.model_copy(update={"turns": True})})
    models = [(w, city, w) for w in a.weights] + [(f"{w}, eight turns", turned, w) for w in a.weights] + [("kde", city, "kde")]
    for what, chosen, weights in models:
        name = what.replace(",", "").replace(" ", "-").replace("/", "-")
        found = measure(chosen, weights, scene, out / f"{name}.png")
        print(json.dumps({"model": what} | found), flush=True)


if __name__ == "__main__":
    main()
