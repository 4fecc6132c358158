"""The examples in the Makefile's help do what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_of_make_test_selects_tests() -> None:
    (example,) = re.findall(r'^test: .*\(some of them: ARGS="([^"]+)"\)', (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *shlex.split(example)]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert re.search(r"^\d+/\d+ tests collected", collected.stdout, re.MULTILINE)


def test_what_it_runs_may_keep_compiled_files() -> None:
    """Else each of a service's processes compiles the service anew when it starts."""
    show = "show: ; @echo [$$PYTHONDONTWRITEBYTECODE]"
    shown = subprocess.run(
        ["make", "--no-print-directory", f"--eval={show}", "show"],
        cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == "[]\n"
