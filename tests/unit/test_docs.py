"""Documents that cannot drift."""

import importlib.util
import json
import re
from pathlib import Path

import typer.main
import yaml

from flows.cli import app
from roadfuse_core.settings import City
from roadfuse_core.training import Recipe, load_recipe

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


def test_the_table_of_networks_is_what_the_rows_say():
    module = _script("compare_networks")
    between = re.search(f"{module.MARKS[0]}\n(.*)\n{module.MARKS[1]}", module.PAGE.read_text(), re.DOTALL)[1]
    assert between == module.page(), "run scripts/compare_networks.py OUT --table"
    rows = [json.loads(p.read_text()) for p in module.ROWS.glob("*.json")]
    assert len({(r["variant"], r["seed"]) for r in rows}) == len(rows), "one recipe for all"
    digests = {load_recipe(module.RECIPE, {"seed": r["seed"], "network.preset": r["variant"]}).digest() for r in rows}
    assert digests == {p.stem for p in module.ROWS.glob("*.json")}, "the rows are of another recipe than the one beside them"


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
