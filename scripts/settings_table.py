"""Write the settings into docs/own-city.md and docs/training.md: python scripts/settings_table.py. A test compares them."""

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from roadfuse_core.settings import City
from roadfuse_core.training import Recipe

DOCS = Path(__file__).parents[1] / "docs"
PAGES: dict[str, type[BaseModel]] = {"own-city.md": City, "training.md": Recipe}
MARKS = ("<!-- settings -->", "<!-- /settings -->")


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    """A table row for every key, depth first."""
    out = []
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        key = f"{prefix}{name}"
        inner = _model(field.annotation)
        if inner and name == "labels":
            key, prefix_of_inner = "labels.CLASS", "labels.CLASS."
        else:
            prefix_of_inner = f"{key}."
        default = "**required**" if field.is_required() else _default(field.default)
        out.append(f"| `{key}` | {default} | {field.description or (inner.__doc__ or '').splitlines()[0].rstrip('.')} |")
        if inner:
            out += rows(inner, prefix_of_inner)
    return out


def _default(value: Any) -> str:
    if value is PydanticUndefined or isinstance(value, BaseModel) or value in ({}, ()) or _records(value):
        return ""
    return "none" if value is None else f"`{value}`".lower() if isinstance(value, bool) else f"`{value}`"


def _records(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(v, BaseModel) for v in value)


def _model(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def table(model: type[BaseModel]) -> str:
    """The whole table."""
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows(model)])


if __name__ == "__main__":
    for name, model in PAGES.items():
        text, made = (DOCS / name).read_text(), f"{MARKS[0]}\n{table(model)}\n{MARKS[1]}"
        (DOCS / name).write_text(re.sub(f"{MARKS[0]}.*{MARKS[1]}", lambda _, made=made: made, text, flags=re.DOTALL))
