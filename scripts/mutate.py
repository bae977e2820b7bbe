"""Make one-line faults in the code and see whether `make test` finds them: python scripts/mutate.py OUT [--number 60].

Every fault is made in a copy of the last commit under OUT, and the tests run there: first the files that import the
faulty package, then, if those pass, the whole suite. OUT/faults.csv gets a line for each fault, and what is there
already is not run again, so the command can be stopped and started again. The last lines printed are the shares that
were found, and the faults that were not.
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("roadfuse_core", "tasks", "flows")
LIMIT_S = 1800


@dataclass(frozen=True)
class Fault:
    """One change of one line.

    Attributes:
        name: Of the fault, or its kind and place.
        file: Path below the repository.
        before: Text that is replaced.
        after: What stands there instead.
        start: Place of the text in the file, characters; -1 where the text occurs once.
    """

    name: str
    file: str
    before: str
    after: str
    start: int = -1

    def apply(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: The text is not there, or a fault without a place would change several places.
        """
        if self.start >= 0:
            if not text.startswith(self.before, self.start):
                raise ValueError(f"{self.file}: {self.before!r} is not at {self.start}")
            return text[: self.start] + self.after + text[self.start + len(self.before) :]
        if text.count(self.before) != 1:
            raise ValueError(f"{self.name}: {self.before!r} stands {text.count(self.before)} times in {self.file}")
        return text.replace(self.before, self.after)


CHOSEN = (
    Fault("gates not handed between levels", "roadfuse_core/models/_network.py",
          "for n, f in features.items()}, raw, present)", "for n, f in features.items()}, None, present)"),
    Fault("plain skips in CMMPNet", "roadfuse_core/models/_network.py",
          "made[n].skips[-1] = y[n]  # skips carry enhanced features", "made[n].skips[-1] = made[n].skips[-1]"),
    Fault("pyramid bins 1, 2, 4, 8", "roadfuse_core/models/_context.py", "BINS = (1, 2, 3, 6)", "BINS = (1, 2, 4, 8)"),
    Fault("a linear poly", "roadfuse_core/training/_module.py", "1 - step / self.steps) ** 0.9)", "1 - step / self.steps))"),
    Fault("an attack that blanks nothing", "roadfuse_core/training/_score.py",
          'return {"blank": corner[0], "omit": corner[1]}', 'return {"blank": corner[0] + px, "omit": corner[1]}'),
    Fault("< for <= on a tile's edge", "roadfuse_core/points/_clean.py",
          "if not (0 <= col[i] < width and 0 <= row[i] < height):", "if not (0 < col[i] < width and 0 <= row[i] < height):"),
    Fault("one dump's sign flipped", "roadfuse_core/cubes/_ingest.py",
          "dataclasses.replace(r, sign=-1)", "dataclasses.replace(r, sign=1)"),
    Fault("a stale chunk carried over", "roadfuse_core/inference/_blocks.py",
          "new = np.where(fresh, values, old)", "new = np.where(fresh & (old == NODATA), values, old)"),
    Fault("a halo one pixel short", "roadfuse_core/cubes/_render.py",
          "return max((layer.radius_px for layer in layers if layer.sigma_px > 0), default=0)",
          "return max((layer.radius_px - 1 for layer in layers if layer.sigma_px > 0), default=0)"),
    Fault("a period off by one", "roadfuse_core/points/_samples.py",
          'return stamps.astype("datetime64[M]").astype(np.int64)',
          'return stamps.astype("datetime64[M]").astype(np.int64) + 1'),
)  # fmt: skip

OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
}  # fmt: skip
# Calls whose loss changes no result: what is only reported.
REPORTS = re.compile(r"^(log\.|logging\.|tell\(|self\.tell\(|console\.|get_run_logger|warnings\.)")


def _comparison(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return ast.Compare(node.left, [OPPOSITE[type(node.ops[0])]()], node.comparators)
    return None


def _sign(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS and not _is_text(node.left) and not _is_text(node.right):
        return ast.BinOp(node.left, SIGNS[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return node.operand
    return None


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _constant(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Constant):
        return None
    if isinstance(node.value, bool):
        return ast.Constant(not node.value)
    if isinstance(node.value, int | float):
        return ast.Constant(node.value + 1)
    return None


def _dropped_call(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not REPORTS.match(ast.unparse(node.value)):
        return ast.Pass()
    return None


def _swapped(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and len(node.args) >= 2 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        if any(isinstance(a, ast.Starred) for a in node.args[:2]) or (
            isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        ):
            return None
        return ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    return None


KINDS: dict[str, Callable[[ast.AST], ast.AST | None]] = {
    "comparison": _comparison, "sign": _sign, "constant": _constant, "dropped call": _dropped_call,
    "swapped arguments": _swapped,
}  # fmt: skip


def faults_of(file: Path) -> Iterator[Fault]:
    """All one-line faults that can be made in a file.

    Args:
        file: A module of the repository.
    """
    text = file.read_text()
    tree = ast.parse(text)
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    name = str(file.relative_to(ROOT))
    for node in _code_of(tree):
        for kind, change in KINDS.items():
            made = change(node)
            if made is not None:
                yield from _as_fault(kind, name, text, offsets, node, made)
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise | ast.Return | ast.Continue):
            yield from _as_fault("removed guard", name, text, offsets, node.test, ast.Constant(False))


def _as_fault(kind: str, name: str, text: str, offsets: list[int], node: ast.AST, made: ast.AST) -> Iterator[Fault]:
    line: int = node.lineno  # type: ignore[attr-defined]
    if line != node.end_lineno:  # type: ignore[attr-defined]
        return
    whole = text[offsets[line - 1] : offsets[line]].encode()
    column = len(whole[: node.col_offset].decode())  # type: ignore[attr-defined]
    before = whole[node.col_offset : node.end_col_offset].decode()  # type: ignore[attr-defined]
    after = ast.unparse(ast.fix_missing_locations(made))
    if isinstance(node, ast.expr) and not isinstance(made, ast.Constant | ast.Call | ast.Name):
        after = f"({after})"
    yield Fault(f"{kind}, {name}:{line}", name, before, after, offsets[line - 1] + column)


def _code_of(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of function bodies, without annotations, docstrings, messages of errors and decorators."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                yield from _below(statement)


def _below(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _below(child)


def room_of(file: str) -> str:
    """Package whose tests come first: `roadfuse_core.points`, `tasks`, `flows`."""
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] == "roadfuse_core" else parts[0]


def draw_faults(number: int, seed: int) -> list[Fault]:
    """Faults at random, as many as possible of every room and kind.

    Args:
        number: How many.
        seed: Another seed, other faults.
    """
    rng = random.Random(seed)
    pools: dict[tuple[str, str], list[Fault]] = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for fault in faults_of(file):
                pools[room_of(fault.file), fault.name.split(",")[0]].append(fault)
    rooms = sorted({room for room, _ in pools})
    chosen: list[Fault] = []
    while len(chosen) < number and any(pools.values()):
        room = rooms[len(chosen) % len(rooms)]
        kinds = sorted(kind for r, kind in pools if r == room and pools[r, kind])
        if not kinds:
            rooms.remove(room)
            continue
        pool = pools[room, rng.choice(kinds)]
        chosen.append(pool.pop(rng.randrange(len(pool))))
    return chosen


def tests_first(fault: Fault, tree: Path) -> list[str]:
    """Test files that import the faulty room, those named after it first."""
    room = room_of(fault.file)
    short = room.rsplit(".", 1)[-1]
    files = sorted((tree / "tests").rglob("test_*.py"))
    about = [f for f in files if re.search(rf"\b{re.escape(room)}\b", f.read_text())]
    about.sort(key=lambda f: short.rstrip("s") not in f.stem)
    return [str(f.relative_to(tree)) for f in about]


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
        name: The fault's.
        before: Text that was replaced.
        after: What stood there instead.
        found: "yes", "by time" where the tests did not end, or "no".
        by: The first test that failed.
        seconds: Time that the tests took.
    """

    name: str
    before: str
    after: str
    found: str
    by: str
    seconds: int


def try_fault(fault: Fault, tree: Path) -> Outcome:
    """Make the fault in the copy, run the tests, take it back."""
    file = tree / fault.file
    text = file.read_text()
    began = time.monotonic()
    file.write_text(fault.apply(text))
    try:
        first = tests_first(fault, tree)
        found, by = _run([*first, "-n", "2"], tree) if first else ("no", "")
        if found == "no":
            found, by = _run(["-n", "2"], tree)
    finally:
        file.write_text(text)
    return Outcome(fault.name, fault.before, fault.after, found, by, round(time.monotonic() - began))


def _run(arguments: list[str], tree: Path) -> tuple[str, str]:
    """Whether the tests fail, and which is named first."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return "by time", ""
    if done.returncode == 0:
        return "no", ""
    named = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return "yes", named[1] if named else done.stdout.strip().splitlines()[-1][:120]


def main() -> None:
    """Make the faults one after the other, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--number", type=int, default=60, help="faults at random, beside the ten chosen ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    a = parser.parse_args()
    faults = [*CHOSEN, *draw_faults(a.number, a.seed)]
    if a.list:
        for fault in faults:
            print(f"{fault.name}: {fault.before}  ->  {fault.after}")
        return
    outcomes = _all(faults, a.out)
    for title, names in (("chosen", {f.name for f in CHOSEN}), ("random", {f.name for f in faults[len(CHOSEN) :]})):
        of = [o for o in outcomes if o.name in names]
        print(f"{title}: {sum(o.found != 'no' for o in of)} of {len(of)} found")
    for o in outcomes:
        if o.found == "no":
            print(f"not found: {o.name}: {o.before}  ->  {o.after}")


def _all(faults: list[Fault], out: Path) -> list[Outcome]:
    out.mkdir(parents=True, exist_ok=True)
    tree, table = out / "tree", out / "faults.csv"
    if not tree.is_dir():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    names = [f.name for f in fields(Outcome)]
    done: list[Outcome] = []
    if table.is_file():
        with table.open() as file:
            done = [Outcome(**row | {"seconds": int(row["seconds"])}) for row in csv.DictReader(file)]  # type: ignore[arg-type]
    known = {o.name for o in done}
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if not done:
            writer.writeheader()
        for fault in faults:
            if fault.name not in known:
                outcome = try_fault(fault, tree)
                writer.writerow(asdict(outcome))
                file.flush()
                done.append(outcome)
                print(f"{len(done)} of {len(faults)}: {outcome.name}: found {outcome.found}, {outcome.by}", flush=True)
    return done


if __name__ == "__main__":
    main()
