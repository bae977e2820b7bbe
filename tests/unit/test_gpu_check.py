"""scripts/gpu_check.py: all of its checks run on a CPU at a tiny size, each of them can fail, and without a GPU it says so."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


@pytest.fixture(scope="module")
def tiny(script):
    return script.Sizes(city_m=256, small_m=256, width=0.0625, window_px=64, batch=3, steps=9, runs=1)


@pytest.mark.slow
def test_all_checks_run_and_state_what_they_want(script, tiny, tmp_path, capsys):
    rows = {row.check: row for row in script.run_checks(tmp_path, tiny, torch.device("cpu"))}
    assert {name for name, row in rows.items() if row.wanted} == {
        "augmentation and rendering", "inference again, 32", "inference again, bf16", "inference, GPU against CPU, float32",
        "training, one rank, loss", "training again, weights", "inference, engine / bare forward pass", "all of this",
    }  # fmt: skip
    for name in (
        "inference again, 32",
        "inference again, bf16",
        "inference, GPU against CPU, float32",
        "training again, weights",
    ):
        assert rows[name].good, rows[name]
    assert rows["inference, GPU against CPU, float32"].found == "0.000%, greatest 0", "both are CPUs"
    assert rows["training again, weights"].found == "apart by 0.0e+00"
    script.show(list(rows.values()), "a CPU")
    assert "training again, weights" in capsys.readouterr().out


@pytest.mark.slow
def test_a_map_that_differs_from_the_cpus_fails(script, tiny, tmp_path, monkeypatch):
    city = script.make_city(tmp_path / "city", tiny.small_m)
    weights = script.make_weights(tmp_path, tiny)
    read, real = [], script.probability

    def shifted(city, group):
        read.append(group)
        return real(city, "once-32") + (4 if group == "elsewhere" else 0)

    monkeypatch.setattr(script, "probability", shifted)
    rows = script.check_bytes(city, weights, lambda city, group: None)
    assert read[-1] == "elsewhere"
    assert [row.good for row in rows] == [True, True, False]
    assert rows[-1].found == "100.000%, greatest 4"


def test_a_row_that_fails_is_the_exit_code(script, tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a card")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    for good, code in ((True, 0), (False, 1)):
        rows = [script.Row("one", "1", "at least 1"), script.Row("another", "2", "at least 3", good)]
        monkeypatch.setattr(script, "run_checks", lambda folder, sizes, device, rows=rows: rows)
        assert script.main() == code
        assert ("FAILS" in capsys.readouterr().out) == (not good)


def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU: PyTorch ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
