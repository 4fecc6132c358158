"""A checkpoint that cannot be served: the application is DEPLOY_FAILED with the file or number, and stays so."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray import serve

import app.main
from app.settings import Settings
from tests.local_group import MODEL
from tests.patience import ANSWER_S, wait_for

pytestmark = pytest.mark.faults

SECONDS_WATCHED = 4.0
"""Longer than the controller's loop and a replica's backoff: what would be started anew had the time for it."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.png", "*.md")))


@pytest.fixture
def name(service: str) -> Iterator[str]:
    """An application beside the one that serves: the first one to start Serve decides on which port it answers."""
    yield "broken"
    serve.delete("broken")


def _small(model: Path, **settings: object) -> dict[str, object]:
    """Settings that find room beside another application, in few processes."""
    in_api = {"text_encoder": {"placement": "api"}, "vae": {"placement": "api"}}
    return {"model": str(model), "cpus_per_rank": 0.05, "cpus_per_helper": 0.02, **in_api, **settings}


def _truncate(model: Path) -> None:
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _remove_the_vae(model: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def _keep(model: Path) -> None:
    pass


def _failure(name: str) -> str:
    """Wait for the application's failure; its message."""

    def failed() -> bool:
        application = serve.status().applications.get(name)
        return application is not None and application.status == "DEPLOY_FAILED"

    wait_for(failed, "the application has failed", ANSWER_S)
    return serve.status().applications[name].message


def _stays_failed(name: str) -> None:
    until = time.monotonic() + SECONDS_WATCHED
    while time.monotonic() < until:
        application = serve.status().applications[name]
        assert application.status == "DEPLOY_FAILED"
        replica = application.deployments.get("FluxReplica")
        # Nothing of it starts, runs or waits to be started.
        assert replica is None or not replica.replica_states, replica
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (_truncate, {}, "transformer/diffusion_pytorch_model.safetensors cannot be read"),
        (_remove_the_vae, {}, "vae/diffusion_pytorch_model.safetensors is missing"),
        (_keep, {"tensor_parallel_size": 4}, "tensor_parallel_size 4 does not divide the 6 attention heads"),
    ],
)
def test_the_builder_says_what_is_wrong(
    model: Path, damage: Callable[[Path], None], settings: dict[str, object], message: str
) -> None:
    damage(model)
    with pytest.raises(ValueError, match=message):
        app.main.build(Settings(**_small(model, **settings)))


def test_it_is_found_by_the_replica_where_the_head_has_no_folder(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _truncate(model)
    monkeypatch.setattr(app.main, "check_local_checkpoint", lambda settings: None)
    monkeypatch.setattr(app.main, "CONSTRUCTOR_ATTEMPTS", 1)
    built = app.main.build(Settings(**_small(model)))
    with pytest.raises(RuntimeError, match="failed"):
        serve.run(built, name=name, route_prefix="/broken")
    assert "FluxReplica" in _failure(name)
    message = serve.status().applications[name].deployments["FluxReplica"].message
    assert "CheckpointError" in message
    assert "transformer/diffusion_pytorch_model.safetensors cannot be read" in message
    _stays_failed(name)
