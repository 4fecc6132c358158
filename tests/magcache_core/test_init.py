"""Importing the library."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_library_needs_torch_only() -> None:
    code = (
        "import sys, magcache_core; "
        "bad = {'diffusers', 'transformers', 'ray', 'fastapi', 'PIL', 'matplotlib'}; "
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
