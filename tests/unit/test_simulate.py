"""The simulator: the same bytes for the same seed, blocks that fit, and knobs that move what they name."""

import hashlib
import json
from functools import lru_cache

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from pyproj import Transformer
from rio_cogeo.cogeo import cog_validate
from scipy import ndimage

from roadfuse_core.grid import make_grid
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import CityKnobs, DirtKnobs, SimulatedCity, simulate_city

CLEAN = DirtKnobs(null_island=0, not_finite=0, swapped=0, duplicate=0, teleport=0)
BASE = CityKnobs(
    seed=58, size_m=768, tile_px=128, canopy=0.1, shadow=0.1, lookalikes=0, parking=0, untravelled=0, canyon_bias_m=0,
    gps_noise_m=2, days=1, points_per_day=20_000, dirt=CLEAN, intervals_s=(5.0,), outdated_missing=0, outdated_gone=0,
)  # fmt: skip


@lru_cache(maxsize=16)
def city(**knobs) -> SimulatedCity:
    return SimulatedCity(BASE.model_copy(update=knobs))


@lru_cache(maxsize=16)
def picture(**knobs):
    return city(**knobs).image(0, 0, 768)


@lru_cache(maxsize=16)
def points(**knobs):
    return next(city(**knobs).points(0))[0]


@lru_cache(maxsize=4)
def truth():
    return city().truth() > 0


def pixels(**knobs):
    """Fractional (row, column) of the points on the grid."""
    c, table = city(**knobs), points(**knobs)
    to_grid = Transformer.from_crs(4326, c.grid.crs, always_xy=True)
    col, row = ~c.grid.affine @ to_grid.transform(table["lon"].to_numpy(), table["lat"].to_numpy())
    on = (row >= 0) & (col >= 0) & (row < 768) & (col < 768)
    return row[on], col[on]


def colour_classifier():
    """Road by colour alone, from the histogram of the base city: what an image shows to the simplest eye."""
    cell = _cells(picture())
    road = np.bincount(cell[truth()], minlength=4096)
    other = np.bincount(cell[~truth()], minlength=4096)
    return road > other


def _cells(image):
    q = (image // 16).astype(int)
    return q[0] * 256 + q[1] * 16 + q[2]


def image_scores(**knobs):
    """Precision and recall of the colour classifier."""
    p = colour_classifier()[_cells(picture(**knobs))]
    return (p & truth()).sum() / p.sum(), (p & truth()).sum() / truth().sum()


def density_scores(**knobs):
    """Precision and recall of smoothed counts at one threshold for all."""
    row, col = pixels(**knobs)
    count = np.zeros((768, 768))
    np.add.at(count, (row.astype(int), col.astype(int)), 1)
    p = ndimage.gaussian_filter(count, 2.0) > 0.004
    return (p & truth()).sum() / p.sum(), (p & truth()).sum() / truth().sum()


def test_more_canopy_hides_roads_from_the_image():
    assert image_scores(canopy=0.9)[1] < image_scores()[1] - 0.05


def test_more_shadow_hides_roads_from_the_image():
    assert image_scores(shadow=1.0)[1] < image_scores()[1] - 0.01


def test_look_alikes_cost_the_image_precision():
    assert image_scores(lookalikes=1.0)[0] < image_scores()[0] - 0.01


def test_less_contrast_hides_roads_from_the_image():
    assert image_scores(road_contrast=0.2)[1] < image_scores()[1] - 0.1


def test_fog_takes_contrast():
    assert picture(fog=0.7).std() < 0.6 * picture().std()


def test_more_noise_costs_the_points_precision():
    assert density_scores(gps_noise_m=10)[0] < density_scores()[0] - 0.05


def test_canyons_cost_the_points_precision():
    assert density_scores(canyon_bias_m=20)[0] < density_scores()[0] - 0.01


def test_waiting_areas_cost_the_points_precision():
    assert density_scores(parking=1.0)[0] < density_scores()[0] - 0.005


def test_roads_without_traffic_cost_the_points_recall():
    assert density_scores(untravelled=0.6)[1] < density_scores()[1] - 0.05


def gini(values):
    v = np.sort(values)
    return 1 - 2 * (np.cumsum(v) / v.sum()).mean() + 1 / len(v)


def test_a_steeper_power_law_concentrates_traffic():
    def spread(power):
        row, col = pixels(traffic_power=power)
        return gini(np.bincount(row.astype(int) // 16 * 48 + col.astype(int) // 16, minlength=48 * 48).astype(float))

    assert spread(1.8) > spread(0.3) + 0.02


def test_longer_intervals_are_longer():
    assert np.nanmean(points(intervals_s=(30.0,))["interval"].to_numpy()) > 5 * np.nanmean(points()["interval"].to_numpy())


@pytest.mark.parametrize(
    ("knob", "coarse", "column"),
    [("coordinate_step_deg", 1e-3, "lon"), ("speed_step_kmh", 10.0, "speed"), ("bearing_step_deg", 45.0, "bearing")],
)
def test_coarser_steps_leave_fewer_values(knob, coarse, column):
    few, many = (len(np.unique(t[column].to_numpy())) for t in (points(**{knob: coarse}), points()))
    assert few < many / 2


def test_an_outdated_map_lacks_roads_and_shows_gone_ones():
    full = city().old_map()
    assert len(city(outdated_missing=0.5).old_map()) < 0.8 * len(full)
    assert city(outdated_gone=0.3).old_map().gone.sum() > 0
    assert full.gone.sum() == 0


def test_dirt_is_what_the_knobs_say():
    _, counts = next(city(dirt=DirtKnobs(), intervals_s=(2.0,)).points(0))
    assert counts["null_island"] == 40
    assert counts["duplicate"] == 60
    assert 0 < counts["teleport"] <= 20


def test_the_number_of_rows_is_the_knobs():
    assert points().num_rows == 20_000


def test_blocks_of_the_image_fit_together():
    whole = picture()
    part = city().image(256, 128, 256)
    inner = np.abs(part.astype(int) - whole[:, 256:512, 128:384])
    # The camera's noise is drawn per block: everything else is the same.
    assert inner.mean() < 4
    assert np.abs(inner.mean(0)[:, :4]).mean() < 6
    assert np.abs(inner.mean(0)[:4]).mean() < 6


def digest(folder):
    facts = hashlib.sha256()
    for path in sorted(folder.rglob("*.parquet")) + [folder / "city.yaml", folder / "simulation.json"]:
        facts.update(path.read_bytes())
    for name in ("imagery/aerial.tif", "truth/roads.tif"):
        with rasterio.open(folder / name) as source:
            facts.update(source.read().tobytes())
    return facts.hexdigest()


def test_the_same_seed_gives_the_same_city_on_any_number_of_workers(tmp_path):
    knobs = CityKnobs(seed=4, size_m=1280, resolution_m=2.0, tile_px=64, days=2, points_per_day=500)
    for name, workers in (("a", 1), ("b", 2)):
        simulate_city(tmp_path / name, knobs, workers)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    simulate_city(tmp_path / "c", knobs.model_copy(update={"seed": 5}))
    assert digest(tmp_path / "c") != digest(tmp_path / "a")


def test_what_a_user_has_lies_on_one_grid(simulated):
    c = load_city(simulated / "city.yaml")
    grid = c.make_grid()
    assert grid == SimulatedCity(CityKnobs(**json.loads((simulated / "simulation.json").read_text())["knobs"])).grid
    with rasterio.open(simulated / "imagery/aerial.tif") as image, rasterio.open(simulated / "truth/roads.tif") as mask:
        assert image.transform == mask.transform == grid.affine
        assert image.shape == mask.shape == grid.shape
    assert cog_validate(simulated / "imagery/aerial.tif")[0]
    assert sum(pq.read_metadata(p).num_rows for p in simulated.glob("dumps/*.parquet")) == 9027


@pytest.mark.parametrize(("lon", "lat"), [(-46.6, -23.5), (151.2, -33.9), (24.0, 65.0)])
def test_cities_anywhere(tmp_path, lon, lat):
    knobs = CityKnobs(seed=2, size_m=512, tile_px=128, lon=lon, lat=lat, days=1, points_per_day=400)
    c = load_city(simulate_city(tmp_path, knobs))
    assert c.make_grid() == SimulatedCity(knobs).grid
    assert make_grid(c.grid.bounds, 1.0, 128).crs == c.make_grid().crs


def test_large_dumps_come_in_batches():
    big = city(points_per_day=600_000, size_m=768)
    sizes = [t.num_rows for t, _ in big.points(0)]
    assert sum(sizes) == 600_000
    assert max(sizes) <= 250_000
