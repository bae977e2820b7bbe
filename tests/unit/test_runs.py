"""Training runs, scores, comparisons: the same however they are cut, and what NumPy says."""

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
import yaml
from safetensors.torch import load_file
from scipy import stats
from shapely.geometry import LineString
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core import training
from roadfuse_core.cluster import ClusterLostError
from roadfuse_core.errors import ConfigError, DataError, StoreError
from roadfuse_core.imagery import ImageryReader, find_imagery
from roadfuse_core.inference import MapReader, infer
from roadfuse_core.labels import lanes_of, open_map, read_lines
from roadfuse_core.locks import COMMITTER, sole_writer
from roadfuse_core.metrics import score_city
from roadfuse_core.models import load_checkpoint
from roadfuse_core.settings import ClusterSpec, MapSpec, ModelSpec, load_city
from roadfuse_core.training import (
    SUITE,
    View,
    compare,
    lay_ground,
    load_recipe,
    paired,
    parse_vary,
    run_suite,
    score_network,
    train,
)
from roadfuse_core.training import _compare as comparing
from roadfuse_core.training import _ground as ground_module
from tests.unit.test_training import TINY, city, recipe  # noqa: F401

# --- runs --------------------------------------------------------------------------------------------------------------


def _weights(folder):
    return load_file(folder / "checkpoint.safetensors")


def _run_in_a_process(path, out):
    code = f"from pathlib import Path; from roadfuse_core.training import *; import torch; torch.set_num_threads(1)\n" \
           f"train(load_recipe(Path({str(path)!r})), Path({str(out)!r}), threads=1)"  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    "fields",
    [{}, {"keep": "best", "patience": 2, "optimiser": {"schedule": "plateau", "lr": 0.01}}],
    ids=["one-cycle", "plateau"],
)
def test_a_killed_training_goes_on_and_ends_with_the_same_weights(city, tmp_path, fields):
    path = city.root.parent / f"killed-{len(fields)}.yaml"
    path.write_text(yaml.safe_dump(TINY | fields | {"stages": [{"epochs": 6}, {"epochs": 2, "labels": "existing_map"}]}))
    whole = train(load_recipe(path), tmp_path / "whole", threads=1)
    for stage in (0, 1):
        broken = _run_in_a_process(path, tmp_path / "broken")
        state = tmp_path / f"broken/stage-{stage}/last.ckpt"
        while not state.is_file():
            assert broken.poll() is None, broken.stderr.read().decode()
            time.sleep(0.005)
        os.kill(broken.pid, signal.SIGKILL)
        assert broken.wait() == -signal.SIGKILL
        assert not (tmp_path / "broken/checkpoint.safetensors").exists()
    again = train(load_recipe(path), tmp_path / "broken", threads=1)
    for stage in (0, 1):
        parts = [pd.read_csv(tmp_path / f"broken/log/stage-{stage}/{name}.csv") for name in ("metrics-0", "metrics")]
        assert parts[0].epoch.min() == 0
        assert parts[1].epoch.min() > 0, "it went on"
    a, b = _weights(tmp_path / "whole"), _weights(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (again.validation_g_iou, again.epochs) == (whole.validation_g_iou, whole.epochs)


def test_a_full_disk_stops_a_training_that_goes_on_when_there_is_room(recipe, tmp_path, small_disk):
    disk = small_disk("500k")
    with pytest.raises(OSError, match="No space left"):
        train(recipe(), disk, threads=1)
    assert not list(disk.glob("**/*.ckpt")), "no half of a file under its name"
    small_disk("50m")
    train(recipe(), disk, threads=1)
    train(recipe(), tmp_path / "whole", threads=1)
    a, b = _weights(tmp_path / "whole"), _weights(disk)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_batch_norms_keep_their_statistics_at_the_end_of_every_stage(recipe, tmp_path, monkeypatch):
    counted, step = [], training._module.RoadModule.training_step

    def watch(module, batch, number):
        loss = step(module, batch, number)
        norms = [m for m in module.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        counted.append({int(m.num_batches_tracked) for m in norms})
        return loss

    monkeypatch.setattr(training._module.RoadModule, "training_step", watch)
    train(recipe(stages=[{"epochs": 3}, {"epochs": 1}], freeze_norm=0.5), tmp_path / "run", threads=1)
    assert counted == [{1}, {2}, {3}, {3}, {3}, {3}, {4}, {4}], "two steps an epoch: three of six, then one of two"


@pytest.mark.slow
def test_ranks_whose_scheduler_is_lost_go_on_with_another(recipe, tmp_path, scheduler):
    made = recipe(**{"stages": [{"epochs": 60}]}, ranks=2)
    scheduler.add_workers(2)

    def kill_it():
        while not list(tmp_path.glob("broken/stage-0/last.ckpt")):
            time.sleep(0.05)
        scheduler.kill()

    threading.Thread(target=kill_it, daemon=True).start()
    with pytest.raises(ClusterLostError, match="training: the Dask scheduler was lost; run again"):
        train(made, tmp_path / "broken", cluster=ClusterSpec(kind=scheduler.address))
    scheduler.end()
    train(made, tmp_path / "broken")
    log = pd.read_csv(tmp_path / "broken/log/stage-0/metrics.csv")
    assert log.epoch.min() > 0, "it went on"


def test_a_run_learns_and_its_checkpoint_makes_a_map(city, recipe, tmp_path):
    made = recipe(**{"stages": [{"epochs": 6}], "epoch_windows": 40, "optimiser.lr": 3e-3, "network.width": 0.125,
                     "augmentation": {"camera": 0, "drop_gps": 0, "drop_image": 0, "blank": 0, "perturb": 0, "scale": [1, 1]}})  # fmt: skip
    done = train(made, tmp_path / "run")
    log = pd.read_csv(tmp_path / "run/log/stage-0/metrics.csv")
    losses = log.loss.dropna().to_numpy()
    assert losses[-2:].mean() < losses[:2].mean() - 0.1
    _, info = load_checkpoint(done.checkpoint)
    assert info.recipe["name"] == "tiny"
    assert infer(city, str(done.checkpoint), group="trained")["windows"] > 0
    again = train(made, tmp_path / "run")
    assert again == done, "a finished run is not run again"
    with pytest.raises(StoreError, match="another recipe"):
        train(recipe(seed=5), tmp_path / "run")
    writing = rf"process {os.getpid()} on \S+ \(training of tiny, since .*\) is writing there"
    with sole_writer(tmp_path / "run", (COMMITTER,), "training of tiny"), pytest.raises(StoreError, match=writing):
        train(made, tmp_path / "run")


# --- scores, comparisons, robustness -----------------------------------------------------------------------------------


class Perfect(torch.nn.Module):
    """Says road where the image is bright."""

    def __init__(self, flip):
        super().__init__()
        self.dummy, self.flip = torch.nn.Parameter(torch.zeros(1)), flip

    def forward(self, inputs, present):
        from roadfuse_core.models import Prediction

        bright = inputs["image"].mean(1, keepdim=True)
        return Prediction(torch.where(bright > self.flip, 1.0, -1.0), {}, {})


def test_scores_are_those_of_numpy_over_all_tiles(city, tmp_path):
    view, grid = View((), True, 128, 3, False), city.make_grid()
    ground = lay_ground(city, grid.tiles(), "roads", view, tmp_path)
    found = score_network(Perfect(0.1), view, [ground]).scores
    rgb, _ = ImageryReader(city.imagery, find_imagery(city), grid).window(0, 0, *grid.shape)
    said = ((np.rint(rgb) / 255 - 0.5) / 0.25).mean(0) > 0.1
    truth = ground.window(0, 0, 512)[1] == ground_module.ROAD
    tp, fp, fn = (said & truth).sum(), (said & ~truth).sum(), (~said & truth).sum()
    assert found.g_iou == pytest.approx(tp / (tp + fp + fn), abs=1e-3)
    assert found.tiles == grid.n_tiles


def test_paired_intervals_are_students():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.6, 0.1, 5), rng.normal(0.5, 0.1, 5)
    mean, low, high = paired(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert mean == pytest.approx((a - b).mean())
    assert paired([1.0], [0.5])[1] == -np.inf


def test_what_is_varied_is_read_as_yaml():
    assert parse_vary(["network.preset=unet,segnet", "seed=1,2", "layers=[[{kind: count}], [{kind: binary}]]"]) == {
        "network.preset": ["unet", "segnet"], "seed": [1, 2], "layers": [[{"kind": "count"}], [{"kind": "binary"}]],
    }  # fmt: skip
    for wrong in ("seed", "=1", "seed=", "seed=[1", "seed=[]"):
        with pytest.raises(ConfigError, match="--vary"):
            parse_vary([wrong])


def test_a_comparison_makes_a_table_and_goes_on_where_it_stopped(city, tmp_path, monkeypatch):
    path = city.root.parent / "compared.yaml"
    path.write_text(yaml.safe_dump(TINY | {"stages": [{"epochs": 1}]}))
    vary = {"network.preset": ["d-linknet34", "e-road-18"], "seed": [1, 2]}
    started, real = [], comparing.train

    def dies_at_third(recipe, *a, **k):
        started.append(recipe.seed)
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(recipe, *a, **k)

    monkeypatch.setattr(comparing, "train", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        compare(path, vary, tmp_path)
    made = compare(path, vary, tmp_path)
    assert len(started) == 5, "two runs were done, the third began anew"
    assert set(made.table.index) == set(vary["network.preset"])
    assert (made.table.seeds == 2).all()
    by = made.runs.groupby("variant").g_iou.mean()
    assert made.table.g_iou.to_dict() == pytest.approx(by.to_dict())
    page = (tmp_path / "compare.html").read_text()
    assert "data:image/png;base64," in page
    assert "e-road-18" in page
    listed = CliRunner().invoke(
        app,
        [
            "compare",
            str(path),
            "--vary",
            "network.preset=d-linknet34",
            "--vary",
            "seed=1,3",
            "--out",
            str(tmp_path),
            "--dry-run",
        ],
    )
    assert listed.output.splitlines() == ["d-linknet34, seed 1, done", "d-linknet34, seed 3"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages=[{labels: buildings}]", "has no labels.buildings; name such a map"),
        ("network.resnet=no.pth", "network.resnet: .*no.pth' does not exist"),
        ("network.start=no.safetensors", "network.start: .*no.safetensors' does not exist"),
        ("network={preset: d-linknet34, change: {modalities: {image: 3, lidar: 1}}}", "has no lidar, and the network needs it"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(city, tmp_path, setting, message):
    path = tmp_path / "dry.yaml"
    path.write_text(yaml.safe_dump(TINY | {"cities": [str(city.root / "city.yaml")]}))
    key, _, value = setting.partition("=")
    vary = f"{key}=[{value}]"
    for command in (["train", "--set", setting], ["compare", "--vary", vary]):
        made = CliRunner().invoke(app, [command[0], str(path), *command[1:], "--dry-run"])
        assert re.search(message, str(made.exception)), (command, made.output, made.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["dry.yaml"]


def test_the_suite_damages_what_it_says(city, tmp_path):
    table = run_suite([city], [Path(training.__file__).parents[1] / "weights/fused.safetensors"], tmp_path / "out")
    assert len(table) == len(SUITE)
    by = table.set_index(["family", "level"]).g_iou
    assert by["no image", 1] < by["none", 0]
    assert by["fog", 0.75] < by["none", 0]
    assert table.set_index("family")["drop"]["none"] == 0
    assert (tmp_path / "out/suite.csv").is_file()
    assert "Bokeh" in (tmp_path / "out/suite.html").read_text()


def test_the_suite_is_for_networks(city, tmp_path):
    shipped = Path(training.__file__).parents[1] / "weights"
    with pytest.raises(ConfigError, match=r"--weights: 'kde\.json' is no network, and the suite is for networks"):
        run_suite([city], [shipped / "fused.safetensors", shipped / "kde.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


OSM = """<?xml version='1.0'?><osm version="0.6">
<node id="1" lat="48.0" lon="16.0"/><node id="2" lat="48.0" lon="16.001"/><node id="3" lat="48.001" lon="16.0"/>
<way id="10"><nd ref="1"/><nd ref="2"/><tag k="highway" v="residential"/><tag k="lanes" v="2"/></way>
<way id="11"><nd ref="2"/><nd ref="3"/><tag k="highway" v="footway"/></way>
<way id="12"><nd ref="1"/><nd ref="3"/><tag k="highway" v="primary"/></way>
</osm>"""


def test_openstreetmap_is_read_as_text_and_packed(tmp_path):
    (tmp_path / "a.osm").write_text(OSM)
    (tmp_path / "a.osm.gz").write_bytes(gzip.compress(OSM.encode()))
    for name in ("a.osm", "a.osm.gz"):
        ways = read_lines(tmp_path / name, MapSpec(path=name), "x")
        assert ways.highway.tolist() == ["residential", "primary"], "no footway"
        assert lanes_of(ways, "x", name).tolist() == [2, 1.5]
    ways.to_file(tmp_path / "b.geojson")
    (tmp_path / "b.geojson.gz").write_bytes(gzip.compress((tmp_path / "b.geojson").read_bytes()))
    ways.to_parquet(tmp_path / "b.parquet")
    for name in ("b.geojson", "b.geojson.gz", "b.parquet"):
        assert len(read_lines(tmp_path / name, MapSpec(path=name), "x")) == 2
    (tmp_path / "c.osm.gz").write_bytes(gzip.compress(OSM.encode())[:100])
    with pytest.raises(DataError, match=r"c\.osm\.gz (is not a readable map|holds neither lines nor areas)"):
        read_lines(tmp_path / "c.osm.gz", MapSpec(path="c.osm.gz"), "x")


def test_lanes_decide_the_width_of_openstreetmap(city, tmp_path):
    grid = city.make_grid()
    b = grid.bounds
    lines = [LineString([(b.left, b.top - y), (b.right, b.top - y)]) for y in (50, 150, 250, 350)]
    table = gpd.GeoDataFrame({"highway": ["primary", "track", "residential", "service"], "lanes": [None, None, "4", "junk"]},
                             geometry=lines, crs=grid.crs)  # fmt: skip
    table.to_file(tmp_path / "osm.gpkg")
    road, _ = open_map(city, MapSpec(path=str(tmp_path / "osm.gpkg"), lane_m=4), "x", grid).window(0, 0, 512, 512)
    assert [int(road[y - 30 : y + 30, 100].sum()) for y in (50, 150, 250, 350)] == [6, 2, 16, 4]
    table.drop(columns="highway").to_file(tmp_path / "other.gpkg")
    with pytest.raises(ConfigError, match="lane_m"):
        open_map(city, MapSpec(path=str(tmp_path / "other.gpkg"), lane_m=4), "x", grid)


# --- classes -----------------------------------------------------------------------------------------------------------


def test_a_network_finds_the_class_that_its_last_stage_taught(city, tmp_path):
    grid = city.make_grid()
    blocks = np.zeros(grid.shape, np.uint8)
    blocks[:, ::128], blocks[:, 1::128] = 1, 1
    with rasterio.open(tmp_path / "blocks.tif", "w", driver="GTiff", height=grid.shape[0], width=grid.shape[1], count=1,
                       dtype="uint8", crs=grid.crs, transform=grid.affine) as dst:  # fmt: skip
        dst.write(blocks, 1)
    raw = yaml.safe_load((city.root / "city.yaml").read_text())
    raw["labels"]["buildings"] = {"path": str(tmp_path / "blocks.tif")}
    path = city.root / "classes.yaml"
    path.write_text(yaml.safe_dump(raw))
    taught = tmp_path / "recipe.yaml"
    stages = [{"labels": "existing_map", "epochs": 1}, {"labels": "buildings", "epochs": 1}]
    taught.write_text(yaml.safe_dump(TINY | {"cities": [str(path)], "stages": stages}))
    done = train(load_recipe(taught), tmp_path / "run", threads=1)
    info = load_checkpoint(done.checkpoint)[1]
    assert (info.target, load_recipe(taught).target) == ("buildings", "buildings")
    model = ModelSpec(weights=str(done.checkpoint), threshold=0.01)  # so low that the map is not empty
    there = load_city(path).model_copy(update={"model": model, "workspace": str(tmp_path / "work")})
    shutil.copytree(city.workspace_path, tmp_path / "work")
    with pytest.raises(ConfigError, match="is not what the model finds: buildings; set it"):
        infer(there)
    infer(there.model_copy(update={"target": "buildings"}))
    found = MapReader(there).window("road", 0, 0, *grid.shape) == 1
    assert found.any()
    for target, truth in (
        ("buildings", blocks > 0),
        ("roads", open_map(there, *there.truth, grid).window(0, 0, *grid.shape)[0]),
    ):
        scored = score_city(there.model_copy(update={"target": target})).subsets["all"]["g_iou"]
        assert scored == pytest.approx((found & truth).sum() / (found | truth).sum())
    with pytest.raises(ConfigError, match="has no labels"):
        run_suite([city], [done.checkpoint], tmp_path / "suite")
    run_suite([there], [done.checkpoint], tmp_path / "suite")
