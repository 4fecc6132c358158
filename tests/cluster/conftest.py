"""A real Ray cluster of two logical CPUs, and in it the application of deployments/flux-tiny.yaml, on a free port."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
import ray
import yaml
from diffusers import FluxPipeline
from ray import serve

from app.main import build
from app.serve import RAY_ENVIRONMENT
from app.settings import Settings
from scripts.ray_start import start_ray
from scripts.serve_process import free_port
from tests.conftest import shares_the_service
from tests.local_group import load_pipeline
from tests.lora_files import write_lora
from tests.patience import ANSWER_S

ADAPTER = "queries"
RUNNING = pytest.StashKey[ExitStack]()
"""What ends the shared service."""
DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"


def settings_of(name: str) -> Settings:
    document = yaml.safe_load((DEPLOYMENTS / name).read_text())
    return Settings(**document["applications"][0]["args"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    os.environ |= RAY_ENVIRONMENT  # as app.serve does
    # Its own in each of pytest's workers, whatever else runs on this machine.
    start_ray(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def profile_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the service keeps its own profiles in."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="session")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The service's folder of adapters, with `ADAPTER` in it."""
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / f"{ADAPTER}.safetensors", fill=0.3)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """End the shared service after its last test: idle, it would take a quarter of a core from all that follow.

    One of pytest's workers has all of its tests, one after another; without workers they are spread over the run.
    """
    result = yield
    follows = nextitem is not None and shares_the_service(nextitem.nodeid)
    if "PYTEST_XDIST_WORKER" in os.environ and not follows and RUNNING in item.config.stash:
        item.config.stash[RUNNING].close()
    return result


@pytest.fixture(scope="session")
def service(cluster: None, profile_dir: Path, lora_dir: Path, pytestconfig: pytest.Config) -> Iterator[str]:
    """The service's URL."""
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    settings = settings_of("flux-tiny.yaml")
    magcache = settings.magcache.model_copy(update={"profile_dir": str(profile_dir)})
    # Two API processes, so that each test also shows that it does not matter which one answers.
    update = {"magcache": magcache, "api_replicas": 2, "loras": str(lora_dir), "hang_timeout_s": 30.0}
    serve.run(build(settings.model_copy(update=update)), name="flux", route_prefix="/")
    with ExitStack() as stack:
        stack.callback(serve.shutdown)
        pytestconfig.stash[RUNNING] = stack
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(service: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service}/v1", api_key="unused", max_retries=0, timeout=ANSWER_S) as client:
        yield client


@pytest.fixture
def http(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=ANSWER_S) as client:
        yield client


@pytest.fixture(scope="session")
def pipeline() -> FluxPipeline:
    return load_pipeline()
