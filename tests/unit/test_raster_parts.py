"""A raster is what it is made of: when a file behind it changes, so does the map."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import yaml

from roadfuse_core.imagery import identify
from roadfuse_core.inference import MapReader, infer, plan_refresh
from roadfuse_core.inference import _calibrate as calibrating
from roadfuse_core.settings import load_city

HALF, HIGH = 150, 210


@pytest.fixture
def city(tmp_path):
    """Images alone, two halves under a virtual raster; a window of the shipped network."""
    spec = {"name": "halves", "workspace": "work", "imagery": {"sources": ["m.vrt"]}, "model": {"weights": "image", "batch": 2, "precision": "32"},
            "grid": {"bounds": [23.73, 37.97, 23.7339, 37.9715], "crs": "EPSG:32634", "resolution_m": 1.0, "tile_px": 128}}  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    made = load_city(tmp_path / "city.yaml")
    for k in (0, 1):
        write_half(made, tmp_path / f"t{k}.tif", k, seed=k)
    write_vrt(made, tmp_path / "m.vrt", ["t0.tif", "t1.tif"])
    return made


def write_half(city, path, k, seed):
    place = city.make_grid().affine @ rasterio.Affine.translation(30 + k * HALF, 20)
    with rasterio.open(path, "w", driver="GTiff", height=HIGH, width=HALF, count=3, dtype="uint8", crs="EPSG:32634",
                       transform=place) as target:  # fmt: skip
        target.write(np.random.default_rng(seed).integers(0, 255, (3, HIGH, HALF), dtype=np.uint8))


def write_vrt(city, path, names, relative=1):
    place = (city.make_grid().affine @ rasterio.Affine.translation(30, 20)).to_gdal()
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><ColorInterp>{colour}</ColorInterp>'
        + "".join(
            f'<SimpleSource><SourceFilename relativeToVRT="{relative}">{name}</SourceFilename><SourceBand>{band}</SourceBand>'
            f'<SrcRect xOff="0" yOff="0" xSize="{HALF}" ySize="{HIGH}"/>'
            f'<DstRect xOff="{k * HALF}" yOff="0" xSize="{HALF}" ySize="{HIGH}"/></SimpleSource>'
            for k, name in enumerate(names)
        )
        + "</VRTRasterBand>"
        for band, colour in ((1, "Red"), (2, "Green"), (3, "Blue"))
    )
    path.write_text(
        f'<VRTDataset rasterXSize="{len(names) * HALF}" rasterYSize="{HIGH}"><SRS>EPSG:32634</SRS>'
        f"<GeoTransform>{', '.join(map(str, place))}</GeoTransform>{bands}</VRTDataset>"
    )


def probability(city, group="map"):
    return MapReader(city, group).window("probability", 0, 0, *city.make_grid().shape)


def assert_seen(city, change):
    before = probability(city)
    change()
    assert not infer(city)["full"]
    got = probability(city)
    infer(city, group="full", full=True)
    assert np.array_equal(got, probability(city, "full"))
    assert not np.array_equal(got, before)


def nested(city):
    (city.root / "m.vrt").rename(city.root / "inner.vrt")
    text = (city.root / "inner.vrt").read_text()
    for k in (0, 1):
        text = text.replace(f"t{k}.tif", "inner.vrt")
    whole = f'xSize="{2 * HALF}"'
    (city.root / "m.vrt").write_text(text.replace(f'xSize="{HALF}"', whole).replace(f'xOff="{HALF}"', 'xOff="0"'))


def archived(city):
    with zipfile.ZipFile(city.root / "tiles.zip", "w") as archive:
        for k in (0, 1):
            archive.write(city.root / f"t{k}.tif", f"in/t{k}.tif")
    write_vrt(city, city.root / "m.vrt", [f"/vsizip/{city.root}/tiles.zip/in/t{k}.tif" for k in (0, 1)], relative=0)


def absolute(city):
    write_vrt(city, city.root / "m.vrt", [str(city.root / f"t{k}.tif") for k in (0, 1)], relative=0)


def change_half(city):
    write_half(city, city.root / "t1.tif", 1, seed=9)
    if (city.root / "tiles.zip").exists():
        archived(city)


@pytest.mark.parametrize("laid_out", [lambda city: None, nested, archived, absolute])
def test_a_file_behind_a_virtual_raster_changes(city, laid_out):
    laid_out(city)
    infer(city)
    vrt = (city.root / "m.vrt").read_bytes()
    stat = os.stat(city.root / "m.vrt")
    assert_seen(city, lambda: change_half(city))
    os.utime(city.root / "m.vrt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (city.root / "m.vrt").read_bytes() == vrt
    assert infer(city)["made"] == MapReader(city).record["made"]


def test_a_mask_beside_an_image_comes_and_goes(city):
    """Inside a virtual raster and on its own."""
    shutil.copy(city.root / "t0.tif", city.root / "alone.tif")
    alone = city.model_copy(update={"imagery": city.imagery.model_copy(update={"sources": ("alone.tif",)})})
    before = identify([str(city.root / "alone.tif")])
    assert before == identify([str(city.root / "alone.tif")])
    assert len(before[0].parts) == 0
    infer(alone)

    def mask():
        with rasterio.open(city.root / "alone.tif", "r+") as target:
            target.write_mask(np.tile(np.array([True] * 70 + [False] * 80), (HIGH, 1)))

    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        mask()
    assert (city.root / "alone.tif.msk").is_file()
    stat = os.stat(city.root / "alone.tif")
    assert_seen(alone, lambda: None)
    (city.root / "alone.tif.msk").unlink()
    os.utime(city.root / "alone.tif", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_seen(alone, lambda: None)


def test_a_record_of_the_version_before_is_carried_over_where_nothing_else_lies_behind_an_image(city):
    """It named path, size, time and box; so does a plain image now, and a virtual one is predicted once more."""
    plan = plan_refresh(city)
    (virtual,) = plan.identity["images"]
    assert [path for path, *_ in virtual[4]] == [str(city.root / f"t{k}.tif") for k in (0, 1)]
    plain = city.model_copy(update={"imagery": city.imagery.model_copy(update={"sources": ("t0.tif",)})})
    assert [len(image) for image in plan_refresh(plain).identity["images"]] == [4]


@pytest.mark.parametrize("name", ["numba", "scipy", "gdal", "proj", "numpy", "torch"])
def test_other_software_makes_the_map_from_nothing(city, monkeypatch, name):
    infer(city)
    real = calibrating.software_versions
    monkeypatch.setattr(calibrating, "software_versions", lambda: real() | {name: "99.1"})
    assert plan_refresh(city).why == f"changed: software ({name})"


def test_a_record_that_names_less_software_makes_the_map_from_nothing(city, monkeypatch):
    """As the version before wrote it."""
    with monkeypatch.context() as patch:
        known = {k: calibrating.software_versions()[k] for k in ("roadfuse", "torch", "rasterio")}
        patch.setattr(calibrating, "software_versions", lambda: known)
        infer(city)
    record = infer(city)
    assert record["full"]
    assert record["why_full"].startswith("changed: software (gdal, numba, numpy")
