"""The faults that `scripts/mutate.py` makes are one line each, in code that parses, over all rooms."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts/mutate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutate"]


def test_every_fault_changes_one_line_of_code_that_still_parses(mutate):
    drawn = mutate.draw_faults(60, seed=0)
    assert len({f.name for f in drawn}) > 55
    for fault in [*mutate.CHOSEN, *drawn]:
        text = (ROOT / fault.file).read_text()
        faulty = fault.apply(text)
        ast.parse(faulty)
        before, after = text.splitlines(), faulty.splitlines()
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, fault.name


def test_faults_are_drawn_from_every_room(mutate):
    rooms = {mutate.room_of(f.file) for f in mutate.draw_faults(60, seed=1)}
    folders = {p.parent.name for p in (ROOT / "roadfuse_core").glob("*/__init__.py")} - {"weights"}
    assert {f"roadfuse_core.{name}" for name in folders} | {"tasks", "flows"} <= rooms


def test_a_text_that_moved_is_refused(mutate):
    fault = mutate.Fault("moved", "x.py", "a < b", "a <= b")
    with pytest.raises(ValueError, match="stands 2 times"):
        fault.apply("a < b; a < b")
    with pytest.raises(ValueError, match="is not at 3"):
        mutate.Fault("moved", "x.py", "a < b", "a <= b", 3).apply("a < b")
