"""docs/architecture.md against the code: its walks name what exists, its table of rooms has the layer rules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_layering import RULES

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PATH = re.compile(r"`((?:app|magcache_core|models|tests|benchmarks)/[\w/]+\.py)`")
FUNCTION = re.compile(r"`(\w+)\(\)`")


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, headings and rulers left out."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def functions(path: Path) -> set[str]:
    """The names of all functions and methods in a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


WALKS = [(PATH.findall(file)[0], name) for file, names, _ in rows(section("Walks")) for name in FUNCTION.findall(names)]


def test_every_file_that_is_named_exists() -> None:
    named = set(PATH.findall(DOCUMENT))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_there_are_four_walks() -> None:
    assert len(re.findall(r"^\*\*Where .*\?\*\*$", section("Walks"), re.MULTILINE)) == 4
    assert len(WALKS) > 25


@pytest.mark.parametrize(("file", "name"), WALKS)
def test_a_walks_function_is_where_the_document_says(file: str, name: str) -> None:
    assert name in functions(ROOT / file)


def test_the_table_of_rooms_has_the_layer_rules() -> None:
    """A room that lists what it imports has a rule that allows just that, and each room of app/ is in the table."""
    listed = {cells[0].strip("`/"): set(re.findall(r"`([\w.]+)`", cells[2])) for cells in rows(section("Modules"))}
    rooms = {f"app.{path.stem}" for path in (ROOT / "app").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"app.__init__", "app.__pycache__", "app.setting_sections"} <= set(listed)
    allowed = {
        rule.layer: {name.removeprefix("app.") for name in rule.allowed if name != rule.layer}
        for rule in RULES
        if "app" in rule.forbidden and rule.layer in listed
    }
    assert len(allowed) > 8
    assert {room: listed[room] for room in allowed} == allowed


def test_a_room_that_may_import_anything_but_some_has_that_rule() -> None:
    """The other rooms are listed by what they may not import."""
    others = {
        cells[0].strip("`"): cells[2] for cells in rows(section("Modules")) if cells[2].startswith("anything but")
    }
    assert set(others) == {"app.api", "app.cluster", "app.main"}
    for room, text in others.items():
        forbidden = {name for rule in RULES if rule.layer in (room, "app") for name in rule.forbidden}
        refused = {name for name in forbidden if name.startswith("app.")} - {room}
        assert {f"app.{name}" for name in re.findall(r"`(\w+)`", text)} == refused
