"""What leaves the repository: the wheel, and what an image is built from."""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# What lies about in a folder where somebody works: keys, cities, points, and what tools leave.
PRIVATE = [
    ".env", "infra/compose/.env", "infra/compose/.env.local", "cities/a/city.yaml", "cities/a/dumps/1.parquet", "cities/metrics/a.prom",
    "cities2/b.yaml", "id_rsa", "server.pem", "dump.parquet", "work/cubes/repo", "runs/first/checkpoint.safetensors", "demo/city.yaml",
    ".git/config", ".aws/credentials", "flows/.env", "roadfuse_core/__pycache__/x.pyc", "tests/real/work/a.tif", "infra/compose/keys.txt",
]  # fmt: skip


def tracked() -> list[str]:
    """Files of the repository, whatever else lies beside them."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    return [name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def copy(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> set[str]:
    """Files that `docker build` would send, by Docker's own rules, from a folder with private files."""
    folder = tmp_path_factory.mktemp("context")
    for name in [*tracked(), *PRIVATE]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return {name for name in exclude_paths(str(folder), patterns) if (folder / name).is_file()}


def test_nothing_private_enters_an_image(context):
    assert not context & set(PRIVATE)
    # Docker reads .dockerignore itself, whatever it says, and copies it nowhere.
    outside = {name for name in context - {".dockerignore"} if name.split("/")[0] not in ("flows", "tasks", "roadfuse_core")}
    assert outside == {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "infra/prefect.yaml"}


def test_all_that_an_image_is_made_of_enters_it(context):
    packages = {n for n in tracked() if n.split("/")[0] in ("flows", "tasks", "roadfuse_core")}
    assert packages <= context
    for path in (ROOT / "infra/docker").iterdir():
        for copied in re.findall(r"^COPY (?!--)(.+) \S+$", path.read_text(), re.MULTILINE):
            assert set(copied.split()) - {"."} <= context, path.name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    copy(folder / "source", [n for n in tracked() if not n.startswith(("tests/", "docs/"))])
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*command, folder / "source"], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_says_what_it_is_and_under_which_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        home = next(n for n in names if n.endswith("METADATA")).split("/")[0]
        facts = Parser().parsestr(archive.read(f"{home}/METADATA").decode())
        licence = archive.read(f"{home}/licenses/LICENSE").decode()
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts.get_all("License-File") == ["LICENSE"]
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert {n.split("/")[0] for n in names} == {"flows", "tasks", "roadfuse_core", home}
    shipped = {n for n in tracked() if n.split("/")[0] in ("flows", "tasks", "roadfuse_core")}
    assert shipped <= set(names)


def test_the_wheel_asks_for_ranges_and_the_constraints_lie_within(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        facts = Parser().parsestr(archive.read(name).decode())
    wanted = [Requirement(text) for text in facts.get_all("Requires-Dist")]
    plain = [r for r in wanted if r.marker is None]
    assert len(plain) > 20
    assert not [str(r) for r in plain if any(s.operator in ("==", "===") for s in r.specifier)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    for requirement in plain:
        version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), str(requirement)


@pytest.mark.slow
def test_the_installed_wheel_is_imported_from_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel], check=True)
    code = "import flows.cli, tasks.progress, roadfuse_core.weights as w; print(flows.__file__, tasks.__file__, w.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=os.environ | {"PYTHONPATH": str(target)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert all(path.startswith(str(target)) for path in done.stdout.split())
    assert len(done.stdout.split()) == 3
    told = subprocess.run([sys.executable, "-m", "flows.cli", "models", "--json"], cwd=empty, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(target)}, check=True)  # fmt: skip
    assert '"preset": "roadfuse"' in told.stdout
