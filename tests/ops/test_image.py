"""The Dockerfile passes its linter, pins what it builds on, and its build context holds all that the service needs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from app.serve import RAY_ENVIRONMENT
from tests.ops.manifests import ROOT, build, named

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n(\s*#.*\n)*", "", DOCKERFILE).splitlines()


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of one kind, continuation lines joined."""
    return [line.partition(" ")[2].strip() for line in LINES if line.startswith(f"{name} ")]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a file into the build: the last pattern that matches it or a folder above decides."""
    kept = True
    parts = path.split("/")
    names = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for pattern in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!")
        anywhere = bare.removeprefix("**/")
        matched = any(fnmatch(name, bare) for name in names) or (bare != anywhere and anywhere in parts)
        if matched:
            kept = pattern.startswith("!")
    return kept


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None, "make setup installs it with the dev extra"
    command = [hadolint, "--config", ROOT / ".hadolint.yaml"]
    lint = subprocess.run([*command, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout) == (0, ""), lint.stdout
    # It does find what is wrong.
    broken = "FROM python\nRUN apt-get update && apt-get install wget\n"
    lint = subprocess.run([*command, "-"], input=broken, capture_output=True, text=True, check=False)
    assert lint.returncode != 0
    assert "DL3006" in lint.stdout


def test_what_it_builds_on_is_pinned() -> None:
    bases = {base.split(" AS ")[0] for base in instructions("FROM")}
    assert len(bases) == 1, "what one stage compiles, another runs"
    (base,) = bases
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base), base
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends ([^&]+)", DOCKERFILE)
    assert packages.split()
    assert all("=" in package for package in packages.split() if package != "\\")
    installs = re.findall(r"pip install ([^\n;]+)", DOCKERFILE)
    assert installs
    assert all("-c constraints.txt" in each or "--no-deps -e ." in each for each in installs), installs


def test_it_runs_without_privileges_and_says_whether_it_is_well() -> None:
    assert instructions("USER") == ["1000:1000"]
    pod = named(build("single-node"), "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 1000
    (check,) = instructions("HEALTHCHECK")
    assert "http://127.0.0.1:8000/health" in check
    # KubeRay's readiness probe of a worker is a wget in a bash; Debian's slim images have the one and not the other.
    assert "wget=" in DOCKERFILE
    assert "/bin/sh" not in DOCKERFILE
    variables = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    assert variables["HOME"] == "/tmp", "the root filesystem is read-only"
    assert variables["HF_HOME"].startswith("/tmp/")


def test_rays_processes_have_the_environment_that_the_command_gives_them() -> None:
    variables = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    assert RAY_ENVIRONMENT.items() <= variables.items()


def test_requirements_are_the_projects() -> None:
    (script,) = re.findall(r"python -c '([^']+)'", DOCKERFILE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.findall(r"(\w+)\) extras=([\w,]+)", DOCKERFILE) == [("cuda", "otlp,gpu"), ("cpu", "otlp")]
    for extras in ("otlp", "otlp,gpu"):
        command = [sys.executable, "-c", script, extras]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        of_extras = [each for extra in extras.split(",") for each in project["optional-dependencies"][extra]]
        assert printed.splitlines() == project["dependencies"] + of_extras


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("app/main.py", True),
        ("app/__pycache__/main.cpython-311.pyc", False),
        ("models/flux-tiny/vae/config.json", True),
        ("models/recipe/vae.py", False),
        ("scripts/leave_cluster.sh", True),
        ("scripts/demo.py", False),
        (".git/config", False),
        (".venv/bin/python", False),
        (".env", False),
        ("tests/conftest.py", False),
    ],
)
def test_the_build_context(path: str, kept: bool) -> None:
    assert in_context(path) is kept


def test_the_build_context_is_enough_to_serve(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    for name in filter(in_context, listed.stdout.splitlines()):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    script = """
import sys, yaml, app
from app.main import build
from app.model_files import model_folder
from app.settings import Settings
from magcache_core import load_profile
for name in ("flux-tiny", "flux"):
    (application,) = yaml.safe_load(open(f"deployments/{name}.yaml"))["applications"]
    settings = Settings(**application["args"])
    build(settings)
    load_profile(settings.magcache.profile or name)
print(app.__file__, model_folder(Settings()))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == [str(tmp_path / "app/__init__.py"), str(tmp_path / "models/flux-tiny")]
