"""Every command in the documents is run as it stands there, in one city's life from its first check to its last clean-up."""

import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from prefect.testing.utilities import prefect_test_harness
from typer.testing import CliRunner

from flows.cli import app
from roadfuse_core.cubes import ledger
from roadfuse_core.settings import load_city

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/operate.md",
    "docs/own-city.md",
    "docs/training.md",
    "docs/networks.md",
    "docs/architecture.md",
    "infra/README.md",
)
# What the words in capitals stand for; `D` is a day of the dump that no earlier command has taken.
WORDS = {
    "CITY.yaml": "city.yaml", "RECIPE.yaml": "first.yaml", "DIR": "drawn", "KEY=V,V": "seed=1,2", "LAYER": "road", "FILE.tif": "road.tif",
    "--from D": "--from 2026-03-31", "--to D": "--to 2026-04-01",
}  # fmt: skip
# As documented, in the order of a city's life; the exit code where it is not 0.
LIFE: list[tuple[str, int]] = [
    ("roadfuse models", 0),
    ("roadfuse simulate DIR", 0),
    ("roadfuse check CITY.yaml", 0),
    ("roadfuse check city.yaml", 0),
    ("roadfuse status", 0),
    ("roadfuse ingest city.yaml --dry-run", 0),
    ("roadfuse backfill city.yaml --from 2026-03-01 --to 2026-04-01 --dry-run", 0),
    ("roadfuse ingest CITY.yaml", 0),
    ("roadfuse ingest city.yaml --replace DUMP", 0),  # of these files with these settings: it stays as it is
    ("roadfuse refresh city.yaml --plan", 0),
    ("roadfuse refresh --plan", 0),
    ("roadfuse refresh city.yaml", 0),
    ("roadfuse ingest city.yaml corrected.parquet --replace DUMP", 0),
    ("roadfuse backfill CITY.yaml --from D --to D", 0),
    ("roadfuse backfill city.yaml --from 2026-03-01 --to 2026-04-01", 0),
    ("roadfuse refresh CITY.yaml", 0),
    ("roadfuse tune CITY.yaml", 0),
    ("roadfuse evaluate CITY.yaml", 0),
    ("roadfuse export CITY.yaml LAYER --out FILE.tif", 0),
    ("roadfuse status CITY.yaml", 0),
    ("roadfuse status city.yaml", 0),
    ("roadfuse rollback city.yaml --dry-run", 0),
    ("roadfuse rollback city.yaml", 0),
    ("roadfuse rollback CITY.yaml", 4),  # two maps were published: there is none before the first
    ("roadfuse release CITY.yaml", 4),  # nothing is held back
    ("roadfuse release city.yaml", 4),
    ("roadfuse expire city.yaml --older-than 30 --dry-run", 0),
    ("roadfuse expire CITY.yaml", 0),
    ("roadfuse train first.yaml --dry-run", 0),
    ("roadfuse train first.yaml", 0),
    ("roadfuse train RECIPE.yaml", 0),
    ("roadfuse train first.yaml --set seed=2 --out runs/second", 0),
    ("roadfuse compare RECIPE.yaml --vary KEY=V,V", 0),
    ("roadfuse compare first.yaml --vary network.preset=roadfuse,cmmpnet-d-linknet34,d-linknet34 --vary seed=1,2,3", 0),
    ("roadfuse evaluate city.yaml --suite --weights default --weights runs/first/checkpoint.safetensors", 0),
]
ELSEWHERE = {
    "roadfuse demo": "make demo, and test_refresh.py",
    "roadfuse compare OUT/recipe.yaml --vary 'stages=[[{epochs: 12}]]' --vary "
    "network.preset=roadfuse,d-linknet34,deepdualmapper-d-linknet34,cmmpnet-d-linknet34": "an hour, after a day's comparison",
    "roadfuse serve CITY.yaml": "test_server.py",
    'roadfuse serve city.yaml --cron "0 3 * * 1" --watch 900': "test_server.py",
}


def documented() -> dict[str, str]:
    """Every `roadfuse` command of the documents, and the page that it is on."""
    found = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
        rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for line in lines + re.findall(r"`([^`]+)`", rest):
            command = " ".join(line.split("#")[0].split()).removeprefix(".venv/bin/")
            if command.startswith("roadfuse "):
                found[command] = page
    return found


def test_the_list_is_what_the_documents_say():
    assert set(documented()) == {c for c, _ in LIFE} | set(ELSEWHERE)


def sources(home: Path, *dumps: str) -> None:
    """Let the city read these dumps."""
    spec = yaml.safe_load((home / "city.yaml").read_text())
    spec["points"]["sources"] = list(dumps)
    (home / "city.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture
def home(small_city, monkeypatch):
    """A folder with city.yaml, a correction of its dump, and first.yaml, the documents' recipe but for its length."""
    root = small_city.root
    sources(root, "dumps/2026-03-29.parquet")
    pq.write_table(pq.read_table(root / "dumps/2026-03-29.parquet").slice(100), root / "corrected.parquet")
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)[1])
    recipe |= {"cities": ["city.yaml"], "stages": [{"epochs": 1}], "epoch_windows": 8, "window_px": 64}
    recipe["network"] |= {"width": 0.125}
    (root / "first.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(root)
    return root


def words(command: str, home: Path) -> list[str]:
    """A documented command as arguments."""
    for word, meant in WORDS.items():
        command = command.replace(word, meant)
    if "DUMP" in command:
        command = command.replace("DUMP", next(iter(ledger(load_city(home / "city.yaml")))))
    arguments = shlex.split(command)[1:]
    if arguments[0] in ("status", "refresh") and "city.yaml" not in arguments:  # a command named in a sentence
        arguments.insert(1, "city.yaml")
    return arguments


@pytest.mark.prefect
@pytest.mark.timeout(600)
def test_every_documented_command_runs(home):
    with prefect_test_harness(server_startup_timeout=120):
        for command, code in LIFE:
            if command == "roadfuse backfill CITY.yaml --from D --to D":
                sources(home, "corrected.parquet", "dumps/2026-03-31.parquet")
            result = CliRunner().invoke(app, words(command, home))
            got = getattr(result.exception, "exit_code", result.exit_code)
            assert got == code, f"{command}\n{result.output}\n{result.exception!r}"
    assert len(ledger(load_city(home / "city.yaml"))) == 2
