"""Scores and kernel density cost what changed: operations are counted, and results equal those of counting everything."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import cubes_path, expire, ingest
from roadfuse_core.grid import Block, TileIndex
from roadfuse_core.inference import MapReader, export_array, infer, rollback
from roadfuse_core.metrics import _city as scoring
from roadfuse_core.metrics import _tune as tuning
from roadfuse_core.metrics import score_city, tune_kde
from roadfuse_core.settings import ClusterSpec, load_city
from tests.unit.test_changes import write_dump


@pytest.fixture
def city(small_city):
    """Mapped by kernel density, which is quick, from points alone; scored, and tuned."""
    city = small_city.model_copy(
        update={"imagery": None, "model": small_city.model.model_copy(update={"weights": "kde", "batch": 3})}
    )
    ingest(city, ["dumps/2026-03-29.parquet"])
    infer(city)
    score_city(city)
    tune_kde(city)
    return city


@pytest.fixture
def counted(monkeypatch):
    """Tiles that are counted, by what for."""
    out = {"scores": [], "tuning": []}
    for what, module in (("scores", scoring), ("tuning", tuning)):

        def watched(job, real=module._count_tiles, seen=out[what]):
            seen.extend(job.tiles)
            return real(job)

        monkeypatch.setattr(module, "_count_tiles", watched)
    return out


def add_dump(city, box=Block(0, 0, 60, 60), replace=None, seed=0):  # noqa: B008
    return ingest(city, [write_dump(city, f"more-{seed}", box, seed=seed)], replace=replace)


def assert_as_from_nothing(city, counted):
    """What was found equals what is found when nothing is kept."""
    found, model = score_city(city), tune_kde(city)
    rows = pq.read_table(city.workspace_path / "scores/map.parquet").to_pylist()
    (city.workspace_path / "scores/map.parquet").unlink()
    (city.workspace_path / "scores/tuning.json").unlink()
    for seen in counted.values():
        seen.clear()
    assert (score_city(city), tune_kde(city)) == (found, model)
    assert pq.read_table(city.workspace_path / "scores/map.parquet").to_pylist() == rows
    assert len(counted["scores"]) == 16
    assert len(counted["tuning"]) == 11


def test_where_nothing_changed_no_tile_is_read(city, counted):
    score_city(city)
    tune_kde(city)
    assert counted == {"scores": [], "tuning": []}


def test_a_dump_in_a_corner_costs_the_tiles_that_see_it(city, counted):
    first = add_dump(city)
    infer(city)
    score_city(city)
    tune_kde(city)
    near = {TileIndex(r, c) for r in (0, 1) for c in (0, 1)}
    assert {TileIndex(0, 0)} <= set(counted["scores"]) <= {TileIndex(r, c) for r in range(3) for c in range(3)}
    assert 0 < len(set(counted["tuning"])) <= len(near)
    assert set(counted["tuning"]) <= near
    assert_as_from_nothing(city, counted)
    add_dump(city, Block(400, 300, 420, 330), first["dump"], seed=1)  # it goes, another one comes elsewhere
    infer(city)
    counted["scores"].clear()
    score_city(city)
    assert len(counted["scores"]) < 16
    assert_as_from_nothing(city, counted)


def test_points_that_change_no_map_change_what_is_near_them(city, counted):
    add_dump(city, Block(250, 250, 252, 252))
    score_city(city)  # the map is the one before
    assert set(counted["scores"]) == {TileIndex(r, c) for r in (0, 1, 2) for c in (0, 1, 2)}
    assert_as_from_nothing(city, counted)


def test_other_labels_and_lost_snapshots_count_everything(city, counted):
    from datetime import UTC, datetime, timedelta

    text = (city.root / "city.yaml").read_text()
    (city.root / "roads.tif").write_bytes((city.root / "truth/roads.tif").read_bytes() + b"\0")
    (city.root / "city.yaml").write_text(text.replace("truth/roads.tif", "roads.tif"))
    other = load_city(city.root / "city.yaml").model_copy(update={"imagery": None, "model": city.model})
    score_city(other)
    tune_kde(other)
    assert (len(counted["scores"]), len(counted["tuning"])) == (16, 11)
    add_dump(city)
    expire(city, datetime.now(UTC) + timedelta(days=1), False, None)
    counted["scores"].clear()
    counted["tuning"].clear()
    score_city(other)
    tune_kde(other)
    assert (len(counted["scores"]), len(counted["tuning"])) == (16, 11)
    assert cubes_path(city).is_dir()


def test_counts_that_are_not_as_they_were_written_are_counted_again(city, counted):
    path = city.workspace_path / "scores/map.parquet"
    whole = pq.read_table(path)
    expected = score_city(city)
    pq.write_table(whole.set_column(4, "tp", [np.array(whole["tp"]) + 1]).replace_schema_metadata(whole.schema.metadata), path)
    assert score_city(city) == expected
    assert len(counted["scores"]) == 16
    for content in (b"", path.read_bytes()[:200]):
        path.write_bytes(content)
        assert score_city(city) == expected
    model, kept = tune_kde(city), city.workspace_path / "scores/tuning.json"
    text = json.loads(kept.read_text())
    text["record"]["counts"][0][0][0] += 1
    for content in (json.dumps(text), "", "{}"):
        kept.write_text(content)
        counted["tuning"].clear()
        assert tune_kde(city) == model
        assert len(counted["tuning"]) == 11


def test_tuning_on_workers_finds_the_same(city):
    alone = tune_kde(city)
    (city.workspace_path / "scores/tuning.json").unlink()
    with open_cluster(ClusterSpec(workers=2)) as client:
        assert tune_kde(city, client=client) == alone
        add_dump(city)
        again = tune_kde(city, client=client)
    (city.workspace_path / "scores/tuning.json").unlink()
    assert tune_kde(city) == again


def test_a_tuning_that_finds_the_same_makes_no_other_map(city):
    """Only the words on its score differ."""
    model, path = tune_kde(city), city.root / "tuned.json"
    path.write_text(model.model_dump_json())
    infer(city, str(path), "baseline")
    path.write_text(model.model_copy(update={"tuned_on": "more tiles"}).model_dump_json(indent=1))
    assert infer(city, str(path), "baseline")["unchanged"]
    path.write_text(model.model_copy(update={"threshold_per_m2": 2 * model.threshold_per_m2}).model_dump_json())
    assert infer(city, str(path), "baseline")["why_full"] == "changed: model"


def test_an_export_is_brought_up_to_date_and_equals_one_from_nothing(city, monkeypatch):
    """After a dump, after a rollback, after a map from nothing, after damage to the file; the road as well as the probability."""
    reads, real = [], MapReader.window
    monkeypatch.setattr(MapReader, "window", lambda self, *a: (reads.append(a), real(self, *a))[1])
    out = city.root / "export"

    def export(folder="export"):
        reader, made = MapReader(city), []
        for name, how in (("probability", "average"), ("road", "mode")):
            export_array(city, reader, name, how, city.root / folder / f"{name}.tif", lambda *t: made.append(t[1]))
        return made

    def assert_as_from_nothing(step):
        for note in (city.workspace_path / "outputs").iterdir():
            note.rename(city.root / note.name)
        export(f"fresh-{step}")
        for note in (city.workspace_path / "outputs").iterdir():
            (city.root / note.name).rename(note)
        for name in ("probability", "road"):
            assert (out / f"{name}.tif").read_bytes() == (city.root / f"fresh-{step}/{name}.tif").read_bytes()

    assert export() == [2, 2]
    assert export() == [0, 0], "nothing changed"
    add_dump(city)
    infer(city)
    reads.clear()
    export()
    assert len(reads) == 2
    assert_as_from_nothing("dump")
    rollback(city)
    assert export() == [2, 2], "the map before is no descendant of what the file shows"
    assert_as_from_nothing("rollback")
    infer(city, full=True)
    assert export() == [2, 2]
    assert_as_from_nothing("anew")
    whole = (out / "road.tif").read_bytes()
    for damage in (whole[:-20], b"", whole[:400] + b"?" + whole[401:]):
        (out / "road.tif").write_bytes(damage)
        assert export() == [0, 2]
        assert (out / "road.tif").read_bytes() == whole
    (out / "road.tif").unlink()
    assert export() == [0, 2]
    assert (out / "road.tif").read_bytes() == whole
