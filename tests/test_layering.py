"""Who may import whom, read from the sources: lazy imports and ones by name count as well."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("app", "magcache_core", "models")
FOLDERS = (*PACKAGES, "benchmarks", "scripts", "tests")
RAY = ("ray",)
WEB = ("fastapi", "starlette", "uvicorn", "aiohttp", "httpx", "requests", "openai")
PROMETHEUS = ("prometheus_client",)


@dataclass(frozen=True)
class Import:
    """``importer`` imports ``name``; ``lazy`` when a function does it."""

    importer: str
    name: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Rule:
    """What the modules at or below ``layer`` may not import, and the modules that may after all."""

    layer: str
    forbidden: tuple[str, ...]
    reason: str
    except_in: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    if_lazy: bool = False


PROCESSES = ("cluster.ingress", "cluster.replica", "cluster.coordinator", "cluster.rank")

RULES = (
    Rule("magcache_core", (*RAY, *WEB, *PROMETHEUS, "pydantic", "app", "models"), "the method needs torch only"),
    Rule(
        "magcache_core",
        ("diffusers", "transformers"),
        "only the hook path and the calibration know diffusers, and load it when they are used",
        except_in=("magcache_core.hooks", "magcache_core.diffusers_bridge", "magcache_core.calibrate"),
        if_lazy=True,
    ),
    # Rooms of app/, from the top: each imports only what stands above it.
    Rule("app.messages", ("app",), "messages are plain data", allowed=("app.messages",)),
    Rule("app.errors", ("app",), "errors are plain data"),
    Rule("app.settings", ("app",), "settings know no other module", allowed=("app.setting_sections",)),
    Rule("app.setting_sections", ("app",), "settings know no other module"),
    Rule("app.logs", ("app",), "every process logs", allowed=("app.settings", "app.telemetry")),
    Rule("app.telemetry", ("app",), "every process names its requests", allowed=("app.settings",)),
    Rule(
        "app.engine",
        ("app", "models", *RAY, *WEB, *PROMETHEUS, "pydantic"),
        "one rank's work needs no cluster, no server and no settings",
        allowed=("app.engine", "app.messages", "app.errors"),
    ),
    Rule("app.model_hints", ("app",), "what a setting may have meant", allowed=("app.engine",)),
    Rule(
        "app.model_files",
        ("app",),
        "where files are",
        allowed=("app.engine", "app.model_hints", "app.settings", "app.errors"),
    ),
    Rule(
        "app.lora_folder",
        ("app",),
        "what a folder offers",
        allowed=("app.engine", "app.messages", "app.model_files", "app.settings"),
    ),
    Rule(
        "app.control",
        (
            "app",
            *RAY,
            *WEB,
            *PROMETHEUS,
            "diffusers",
            "transformers",
        ),
        "decisions are pure: no Ray, no web, no model",
        allowed=("app.control", "app.messages", "app.errors", "app.settings", "app.engine.geometry"),
    ),
    Rule(
        "app.metrics", ("app",), "metrics are written by others", allowed=("app.metrics", "app.messages", "app.control")
    ),
    Rule(
        "app.components",
        ("app", *RAY, *WEB),
        "an encoder or a VAE runs in any process",
        allowed=(
            "app.components",
            "app.engine",
            "app.errors",
            "app.logs",
            "app.messages",
            "app.metrics",
            "app.model_files",
            "app.settings",
        ),
    ),
    Rule(
        "app.api",
        (*RAY, "app.cluster", "app.components", "app.control", "app.main"),
        "HTTP knows its backend by contract",
    ),
    Rule("app", RAY, "Ray lives in the cluster room", except_in=("app.cluster", "app.main", "app.serve")),
    # The Serve ingress is where Serve takes over the API's application.
    Rule("app", WEB, "HTTP lives in the API", except_in=("app.api", "app.cluster.ingress")),
    Rule("app", ("app.main", "app.serve"), "entry points are imported by no module"),
    Rule("app.calibrate", ("app",), "a client of the service knows its routes only"),
    Rule("app.main", ("app.metrics",), "the entry point only binds deployments"),
    Rule("app.serve", ("app",), "it starts Serve and stops it", allowed=("app.cluster",)),
    Rule("app", ("models",), "the service reads the model's files, not its recipe"),
    Rule("models.recipe", (*RAY, *WEB, *PROMETHEUS, "app"), "the recipe trains a model and serves nothing"),
)


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def imports_of(importer: str, source: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import in ``source``, the code of the module ``importer``; ``from a import b`` is an import of ``a.b``."""
    package = importer.split(".") if is_package else importer.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                names = [str(node.args[0].value)]
        yield from (Import(importer, name, getattr(node, "lineno", 0), lazy) for name in names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def all_imports(folders: tuple[str, ...]) -> list[Import]:
    """The imports of all modules below ``folders``."""
    found: list[Import] = []
    for package in folders:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            importer = ".".join(parts[:-1] if is_package else parts)
            found += imports_of(importer, path.read_text(encoding="utf-8"), is_package=is_package)
    return found


def violations(imports: list[Import]) -> list[str]:
    """The imports that a rule forbids, each in a sentence."""
    return [
        f"{found.importer}:{found.line} imports {found.name}: {rule.reason}"
        for found in imports
        for rule in RULES
        if _within(found.importer, (rule.layer,))
        and _within(found.name, rule.forbidden)
        and not _within(found.name, rule.allowed)
        and not (_within(found.importer, rule.except_in) and (found.lazy or not rule.if_lazy))
    ]


def test_every_layer_imports_only_what_it_may() -> None:
    assert violations(all_imports(PACKAGES)) == []


def test_every_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    declared = {re.split(r"[^\w.-]", entry)[0].lower().replace("-", "_") for entry in listed}
    modules = {"pil": "pillow", "yaml": "pyyaml", "opentelemetry": "opentelemetry_sdk", "xdist": "pytest_xdist"}
    used = {found.name.partition(".")[0].lower() for found in all_imports(FOLDERS)} - set(FOLDERS)
    third_party = {modules.get(name, name) for name in used if name not in {*map(str.lower, sys.stdlib_module_names)}}
    assert third_party - declared == set()


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("magcache_core.state", "import ray"),
        ("magcache_core.state", "from diffusers import FluxPipeline"),
        ("magcache_core.state", "def late():\n    import diffusers.hooks"),
        ("magcache_core.hooks", "import diffusers"),
        ("magcache_core.config", "from app.settings import Settings"),
        ("magcache_core.config", "def late():\n    from ..app import settings"),
        ("app.engine.rows", "import fastapi"),
        ("app.engine.rows", "import importlib\nimportlib.import_module('ray.serve')"),
        ("app.engine.rows", "from app import metrics"),
        ("app.engine.rows", "from ..cluster import coordinator"),
        ("app.engine.rows", "class Row:\n    async def late(self):\n        import ray"),
        ("app.api.routes", "from ray import serve"),
        ("app.api.routes", "from app.cluster.replica import FluxReplica"),
        ("app.settings", "import ray.serve"),
        ("app.settings", "from app.metrics import ApiMetrics"),
        ("app.cluster.replica", "from starlette.requests import Request"),
        ("app.cluster.replica", "import app.main"),
        ("app.main", "from app.metrics import ApiMetrics"),
        ("models.recipe.scenes", "from app.engine import sampling"),
        ("app.control.scheduler", "import ray"),
        ("app.control.schedule", "from app.engine.sampling import FlowMatchSampler"),
        ("app.control.admission", "from app.cluster.coordinator import Coordinator"),
        ("app.components.vae", "from app.cluster.handles import result_of"),
        ("app.messages", "from app.errors import ServiceError"),
        ("app.metrics.coordinator", "from app.cluster import coordinator"),
    ],
)
def test_a_forbidden_import_is_found(importer: str, source: str) -> None:
    found = violations(list(imports_of(importer, source)))
    assert found
    assert found[0].startswith(importer)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("magcache_core.hooks", "def late():\n    from diffusers.hooks import HookRegistry"),
        ("magcache_core.state", "import rayleigh"),
        ("app.engine.engine", "import diffusers\nfrom magcache_core import MagCacheState\nfrom . import rows"),
        ("app.cluster.replica", "import ray\nfrom app.api.app import create_app\nfrom app.metrics import ApiMetrics"),
        ("app.main", "from ray import serve\nfrom app.cluster.replica import FluxReplica"),
        ("app.api.routes", "import fastapi\nfrom app.metrics import ApiMetrics"),
    ],
)
def test_an_allowed_import_passes(importer: str, source: str) -> None:
    assert violations(list(imports_of(importer, source))) == []


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("magcache_core", ["diffusers", "transformers", "ray", "fastapi", "prometheus_client", "app"]),
        (
            "app.control.admission, app.control.progress",
            ["diffusers", "transformers", "ray", "fastapi", "starlette", "prometheus_client"],
        ),
        ("app.serve", ["torch", "diffusers", "transformers"]),
        # These take 2 s to load: ranks load them, and a process loads them once it holds an encoder or a VAE.
        *((f"app.{name}", ["diffusers", "transformers"]) for name in ("main", *PROCESSES)),
    ],
)
def test_importing_loads_nothing_big_that_is_not_needed(modules: str, unwanted: list[str]) -> None:
    code = f"import sys, {modules}; print([name for name in {unwanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
