"""What a recipe says is what the optimiser does, and what a damage says is what the network sees."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import Layer
from roadfuse_core.models import Prediction
from roadfuse_core.training import SUITE, View, lay_ground, score_network, train
from roadfuse_core.training._module import RoadModule
from tests.unit.test_training import TINY, city, recipe  # noqa: F401


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every step that `train` makes."""
    noted, step = [], RoadModule.training_step

    def note(module, batch, number):
        noted.append(module.optimizers().param_groups[0]["lr"])
        return step(module, batch, number)

    monkeypatch.setattr(RoadModule, "training_step", note)
    return noted


def test_poly_falls_by_the_power_of_nine_tenths(recipe, tmp_path, rates):
    """lr·(1 - t/T)^0.9 (PP-LinkNet, section 3.4)."""
    made = recipe(
        **{"optimiser.schedule": "poly", "optimiser.lr": 0.003, "batch": 3, "epoch_windows": 11, "stages": [{"epochs": 3}]}
    )
    train(made, tmp_path / "run", threads=1)
    assert rates == pytest.approx([0.003 * (1 - t / 9) ** 0.9 for t in range(9)])


def test_constant_stays(recipe, tmp_path, rates):
    train(recipe(**{"optimiser.schedule": "constant", "optimiser.lr": 0.003}), tmp_path / "run", threads=1)
    assert rates == [0.003] * 4


def test_one_cycle_rises_for_a_tenth_and_falls(recipe, tmp_path, rates):
    made = recipe(**{"optimiser.lr": 0.003, "batch": 3, "epoch_windows": 30, "stages": [{"epochs": 2}]})
    train(made, tmp_path / "run", threads=1)
    top = int(np.argmax(rates))
    assert top in (1, 2), "a tenth of 20 steps"
    assert max(rates) == pytest.approx(0.003, rel=0.05)
    assert sorted(rates[top:], reverse=True) == rates[top:]
    assert rates[0] < 0.003 / 20
    assert rates[-1] < 0.003 / 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=9223372036854775808", "seed: 9223372036854775808 is wrong"),
        ("seed=0x1" + 4000 * "0", "seed: "),
        ("seed=-1", "seed: -1 is wrong"),
        ("split.seed=-1", "split.seed: -1 is wrong"),
        ("split.seed=99999999999999999999999", "split.seed: 99999999999999999999999 is wrong"),
        ("optimiser.lr=.inf", "optimiser.lr: inf is wrong"),
        ("optimiser.weight_decay=.nan", "optimiser.weight_decay: nan is wrong"),
        ("epoch_windows=100000000000000000000", "epoch_windows: 100000000000000000000 is wrong"),
        ("stages=[{epochs: 100000000000000000000}]", "stages.0.epochs: 100000000000000000000 is wrong"),
        ("batch=100000000000000000000", "batch: 100000000000000000000 is wrong"),
        ("ranks=100000000000000000000", "ranks: 100000000000000000000 is wrong"),
    ],
)
def test_numbers_beyond_all_bounds_are_one_line(city, recipe, change, message):
    recipe()
    path = next(city.root.parent.glob("*.yaml"))
    made = CliRunner().invoke(app, ["train", str(path), "--set", change, "--dry-run"])
    assert getattr(made.exception, "exit_code", None) == 2, made.exception
    assert str(made.exception).startswith(message)
    assert "\n" not in str(made.exception)
    assert len(str(made.exception)) < 500


class Watching(torch.nn.Module):
    """Keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.dummy, self.shown = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, inputs, present):
        self.shown.append({name: x.clone() for name, x in inputs.items()})
        return Prediction(torch.zeros_like(inputs["image"][:, :1]), {}, {})

    def seen(self, name):
        return torch.cat([x[name] for x in self.shown])


@pytest.fixture
def shown(city, tmp_path):
    """What a network sees of all tiles under a damage, by its family."""
    view = View((Layer(kind="count"),), True, 96, 3, False)
    ground = lay_ground(city, city.make_grid().tiles(), "roads", view, tmp_path)

    def under(family):
        network = Watching()
        score_network(network, view, [ground], next(d for d in SUITE if d.family == family))
        return network.seen("image"), network.seen("gps")

    return under


def quarters(changed):
    """Of (N, H, W), which of the four quarters of each window hold a change."""
    half = changed.shape[-1] // 2
    parts = [changed[:, r : r + half, c : c + half].flatten(1).any(1) for r in (0, half) for c in (0, half)]
    return torch.stack(parts, 1)


def test_the_attack_blanks_a_quarter_of_the_image_and_another_quarter_of_the_points(shown):
    """DeepDualMapper, section 5.5."""
    (image, gps), (attacked, thinned) = shown("none"), shown("information loss")
    inside = (image != 0).any(1).float().mean((1, 2)) > 0.99  # all of the window is on the grid
    assert inside.sum() > 20
    image, gps, attacked, thinned = (x[inside] for x in (image, gps, attacked, thinned))
    lost = quarters((image != attacked).any(1))
    assert (lost.sum(1) == 1).all(), "of every window one quarter"
    assert lost.any(0).all(), "of some windows each of them"
    gone = (image != 0).any(1) & (attacked == 0).all(1)
    assert gone.float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(attacked[~gone[:, None].expand_as(image)], image[~gone[:, None].expand_as(image)])
    missing = quarters((gps != thinned).any(1))
    assert (missing.sum(1) <= 1).all()
    assert missing.sum() > len(gps) / 2, "most windows have points in the quarter that is blanked"
    assert not (missing & lost).any(), "another quarter"
    for k, (row, col) in enumerate([(0, 0), (0, 48), (48, 0), (48, 48)]):
        part = thinned[missing[:, k], 0, row : row + 48, col : col + 48]
        assert not part.any(), "all of its points"


@pytest.mark.parametrize(("family", "kept"), [("no image", (0, 1)), ("no GPS", (1, 0))])
def test_a_missing_modality_is_told_as_missing(city, tmp_path, family, kept):
    view = View((Layer(kind="count"),), True, 96, 3, False)
    ground = lay_ground(city, city.make_grid().tiles(), "roads", view, tmp_path)
    network, told = Watching(), []
    forward = network.forward
    network.forward = lambda inputs, present: told.append(present) or forward(inputs, present)
    score_network(network, view, [ground], next(d for d in SUITE if d.family == family))
    assert {(float(p["image"].max()), float(p["gps"].max())) for p in told} == {kept}
    assert {(float(p["image"].min()), float(p["gps"].min())) for p in told} == {kept}
