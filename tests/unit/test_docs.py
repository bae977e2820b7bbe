"""Documents that cannot drift."""

import importlib.util
import json
import re
from pathlib import Path

import typer.main
import yaml

from flows.cli import app
from roadfuse_core.settings import City
from roadfuse_core.training import Recipe

ROOT = Path(__file__).parents[2]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _settings_table():
    return _script("settings_table")


def test_the_settings_pages_are_what_the_code_says():
    module = _settings_table()
    for name, model in module.PAGES.items():
        page = (ROOT / "docs" / name).read_text()
        between = re.search(f"{module.MARKS[0]}\n(.*)\n{module.MARKS[1]}", page, re.DOTALL)[1]
        assert between == module.table(model), "run scripts/settings_table.py"


def test_the_tables_of_networks_are_what_the_rows_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = _script("compare_networks")
    expected = set()
    for name, experiment in module.EXPERIMENTS.items():
        between = re.search(f"<!-- {name} -->\n(.*)\n<!-- /{name} -->", module.PAGE.read_text(), re.DOTALL)[1]
        assert between == module.page(name), "run scripts/compare_networks.py OUT --table"
        for (_, network, seed), path in module.row_files(experiment).items():
            expected.add(path)
            row = json.loads(path.read_text()) if path.is_file() else {"seed": seed, "variant": network}
            assert row["seed"] == seed
            assert row["variant"] == network
    assert set(module.ROWS.glob("*.json")) <= expected, "rows of another recipe than those beside them"


def test_every_setting_has_a_description():
    module = _settings_table()
    for model in module.PAGES.values():
        for row in module.rows(model):
            assert row.split("|")[3].strip(), row


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in typer.main.get_command(app).commands:
        assert f"roadfuse {name}" in readme, name


def test_the_example_in_the_readme_is_a_city():
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    City.model_validate(yaml.safe_load(example))


def test_the_example_recipe_is_a_recipe():
    for example in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL):
        Recipe.model_validate(yaml.safe_load(example))


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "DESIGN.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_each_package_sorts_its_public_names():
    import pkgutil

    import roadfuse_core

    for module in pkgutil.iter_modules(roadfuse_core.__path__):
        if module.ispkg:
            package = importlib.import_module(f"roadfuse_core.{module.name}")
            names = getattr(package, "__all__", [])
            assert len(names) == len(set(names))
            for name in names:
                assert hasattr(package, name), (module.name, name)
