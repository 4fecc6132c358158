"""The tests of a module stand under its name: app/api/forms.py has tests/api/test_forms.py."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = {
    "app/api/backend.py": "a protocol and the data that cross it; ServeBackend and the fake one in tests/api keep it",
    "app/messages/calibration.py": "plain data; tests of the calibrator and of its routes read it",
    "app/messages/results.py": "plain data; tests of ranks, coordinator and API read it",
    "app/control/counters.py": "totals as plain attributes; tests of admission and metrics read them",
}
"""Modules without tests under their name, with the reason."""


def modules() -> list[str]:
    files = [path for package in ("app", "magcache_core") for path in (ROOT / package).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py")


def file_of(module: str) -> Path:
    path = Path(module.removeprefix("app/"))
    return ROOT / "tests" / path.parent / f"test_{path.stem.strip('_')}.py"


@pytest.mark.parametrize("module", modules())
def test_a_module_has_tests_under_its_name(module: str) -> None:
    expected = file_of(module)
    assert expected.exists() == (module not in WITHOUT), f"write {expected}, or a reason into WITHOUT"


def test_exceptions_are_few_and_there() -> None:
    assert set(WITHOUT) <= set(modules())
    assert len(WITHOUT) <= 10
