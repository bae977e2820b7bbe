"""A map is scored on tiles from which its model did not learn, and where it is, that is said."""

import json

import numpy as np
import pytest
import rasterio
import yaml
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import ingest
from roadfuse_core.grid import SplitRule, TileIndex, split_by
from roadfuse_core.inference import MapReader, infer, split_of_map
from roadfuse_core.labels import _read, labels_digest
from roadfuse_core.metrics import current_scores, score_city, tune_kde
from roadfuse_core.settings import City, load_city
from tests.unit.test_changes import gated, layers  # noqa: F401
from tests.unit.test_learnt_tiles import with_info


def learnt_here(city, seed=7, **changes):
    grid = city.make_grid()
    return {
        "name": city.name,
        "grid": dict(grid.__dict__),
        "rule": {"seed": seed},
        "purposes": ["train", "validation", "test"],
    } | changes


def use(city, taught, checkpoint=None) -> City:
    """The city under kernel density, which is quick, or a checkpoint, that says where it learnt."""
    raw = yaml.safe_load((city.root / "city.yaml").read_text())
    path = city.root / "kde.json"
    if checkpoint:
        path = with_info(checkpoint, city.root / "taught.safetensors", taught=taught)
    else:
        path.write_text(json.dumps({"sigma_m": 3, "threshold_per_m2": 0.05, "tuned_on": "-", "taught": taught}))
    raw["model"] = {"weights": str(path)}
    (city.root / "city.yaml").write_text(yaml.safe_dump(raw))
    return load_city(city.root / "city.yaml")


def evaluate(city, *arguments):
    done = CliRunner().invoke(app, ["evaluate", str(city.root / "city.yaml"), *arguments], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    return done.stdout


def plain_iou(city, tiles):
    """Of the map on some tiles, counted on whole arrays."""
    with rasterio.open(city.root / "truth/roads.tif") as source:
        truth = source.read(1) > 0
    road, px = layers(city)["road"] == 1, city.make_grid().tile_px
    here = np.zeros_like(road)
    for t in tiles:
        here[t.row * px : (t.row + 1) * px, t.col * px : (t.col + 1) * px] = True
    return (road & truth & here).sum() / ((road | truth) & here).sum()


def test_evaluate_scores_the_tiles_that_the_recipe_kept(small_city, gated):
    city = use(small_city, [learnt_here(small_city)], gated)
    ingest(city)
    infer(city)
    kept = [t for t, name in split_by(city.make_grid(), SplitRule(7)).items() if name == "test"]
    found = json.loads(evaluate(city, "--json"))
    assert found["test"]["g_iou"] == plain_iou(city, kept)
    assert found["tiles"] == {"from": "split seed 7 of the training", "overlap": 0}
    assert "3 test tiles with labels: split seed 7 of the training." in evaluate(city)


def test_a_map_of_before_is_scored_by_the_checkpoint_that_made_it(small_city):
    """A record of an earlier version says nothing of the training; the checkpoint of the same digest does."""
    city = use(small_city, [learnt_here(small_city)])
    ingest(city)
    infer(city)
    record = MapReader(city).record
    del record["learnt"]
    assert split_of_map(city, record).source == "split seed 7 of the training"
    other = split_of_map(city, record | {"model_digest": "another"})
    assert other.source == "split seed 0; the map does not say which tiles its model learnt from"


def test_tiles_that_taught_under_another_name_are_named(small_city):
    """All of the place taught the network as another city: nothing is left to score, and the table says so."""
    city = use(small_city, [learnt_here(small_city, name="twin", purposes=["train"] * 3)])
    ingest(city)
    infer(city)
    said = evaluate(city)
    assert "3 test tiles lie where the model learnt, so that these scores flatter it." in said
    assert json.loads(evaluate(city, "--json"))["tiles"]["overlap"] == 3


def test_a_city_that_taught_in_full_has_no_test_tile(small_city):
    city = use(small_city, [learnt_here(small_city, purposes=["train"] * 3)])
    ingest(city)
    infer(city)
    assert "0 test tiles with labels: split seed 7 of the training. Scores on all tiles flatter the model" in evaluate(city)


@pytest.mark.parametrize("purposes", [["train", "validation", "test"], ["test"] * 3])
def test_kernel_density_is_tuned_on_tiles_that_do_not_score_the_map(small_city, monkeypatch, purposes):
    city = use(small_city, [learnt_here(small_city, purposes=purposes)])
    ingest(city)
    infer(city)
    seen, split, window = set(), split_of_map(city, MapReader(city).record), _read.RasterMap.window

    def watched(self, row, col, height, width):
        seen.add(TileIndex(row=row // height, col=col // width))
        return window(self, row, col, height, width)

    monkeypatch.setattr(_read.RasterMap, "window", watched)
    model = tune_kde(city, split=split)
    assert seen == set(split.named("train"))
    assert seen
    (city.root / "tuned.json").write_text(model.model_dump_json())
    infer(city, str(city.root / "tuned.json"), "baseline")
    assert score_city(city, "baseline").on.tiles_from == score_city(city).on.tiles_from


def test_a_density_that_was_tuned_here_says_where(small_city):
    """`roadfuse tune` writes its tiles down, so that a map by it is scored on others."""
    city = small_city
    ingest(city)
    done = CliRunner().invoke(app, ["tune", str(city.root / "city.yaml"), "--out", str(city.root / "kde.json")])
    assert done.exit_code == 0, done.output
    infer(city, str(city.root / "kde.json"))
    assert "3 test tiles with labels: split seed 0 of the training." in evaluate(city)


def test_scores_are_taken_again_only_for_the_same_map_labels_and_points(small_city):
    city = use(small_city, None)
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    assert current_scores(city) is None
    first = score_city(city)
    assert current_scores(city) == first
    path = city.root / "truth/roads.tif"
    (city.root / "truth").unlink()
    (city.root / "truth").mkdir()
    source = next(p for p in (city.root / "old_map.gpkg").resolve().parent.glob("truth/roads.tif"))
    path.write_bytes(source.read_bytes())
    assert current_scores(city) == first, "a copy of the labels is the same"
    with rasterio.open(path, "r+") as labels:
        labels.write(np.where(labels.read(1) > 0, 0, 1).astype("uint8"), 1)
    assert current_scores(city) is None, "other labels"
    second = score_city(city)
    assert second.on.basis != first.on.basis
    ingest(city)
    infer(city)
    assert current_scores(city) is None, "another map"


def test_the_digest_of_labels_is_of_their_content(small_city):
    city = small_city
    first = labels_digest(city)
    wider = city.model_copy(update={"labels": {"roads": city.labels["roads"].model_copy(update={"width_m": 9.0})}})
    assert labels_digest(wider) != first
    blind = city.model_copy(update={"labels": {}})
    assert labels_digest(blind) is None
    (city.workspace_path / "scores").mkdir(parents=True)
    (city.workspace_path / "scores/map.parquet").write_bytes(b"PAR1 cut")
    assert current_scores(city) is None, "a damaged file is counted again"
