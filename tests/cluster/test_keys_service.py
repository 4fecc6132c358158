"""API keys end to end: two clients that compete for one place in the batch of a running service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ray import serve

from app.main import build
from app.settings import Settings
from tests.cluster.asking import IMAGES, PROMPT, metrics, wait_for
from tests.local_group import MODEL, TEXT_TOKENS

KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789"}
Clients = dict[str, httpx.Client]


@pytest.fixture(scope="module")
def clients(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """A client for each key, and one without, of flux-tiny with one place, beside the session's application."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()), encoding="utf-8")
    settings = Settings.model_validate(
        {
            "model": str(MODEL),
            "served_model_name": "keyed",
            "cpus_per_rank": 0.1,
            "cpus_per_helper": 0.05,
            "max_batch_rows": 1,
            "sampling": {"max_sequence_length": TEXT_TOKENS},
            "text_encoder": {"placement": "api"},
            "vae": {"placement": "api"},
            "http": {"api_keys_file": str(file)},
        }
    )
    serve.run(build(settings), name="keyed", route_prefix="/keyed")
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in KEYS.items()} | {"eve": {}}
    made = {name: httpx.Client(base_url=f"{service}/keyed", headers=own, timeout=120) for name, own in headers.items()}
    yield made
    for client in made.values():
        client.close()
    serve.delete("keyed")


def ask(client: httpx.Client, steps: int = 30, **headers: str) -> int:
    body = {"prompt": PROMPT, "num_inference_steps": steps, "magcache": {"enabled": False}}
    return client.post(IMAGES, json=body, headers=headers).status_code


def test_one_client_does_not_starve_the_other(clients: Clients) -> None:
    """The second one's only image goes before most of those that the first one asked for earlier."""
    with ThreadPoolExecutor(9) as pool:
        many = [pool.submit(ask, clients["alice"]) for _ in range(8)]
        wait_for(lambda: metrics(clients["eve"])["flux_waiting_pictures"] >= 6, "most of the first one's images wait")
        assert pool.submit(ask, clients["bob"]).result() == 200
        assert sum(one.done() for one in many) <= 4
        assert [one.result() for one in many] == 8 * [200]
    counted = clients["eve"].get("/metrics").text
    for key, images in (("alice", 8), ("bob", 1)):
        series = rf'flux_key_requests_total{{key="{key}",model="keyed",outcome="ok",process="\w+"}} {images}\.0'
        assert re.search(series, counted)
    assert not any(key in counted for key in KEYS.values())


def test_only_the_key_that_made_a_request_cancels_it(clients: Clients) -> None:
    assert ask(clients["eve"]) == 401
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, clients["alice"], 100, **{"X-Request-Id": "mine"})
        wait_for(lambda: metrics(clients["eve"])["flux_running_pictures"] == 1, "the image runs")
        assert clients["bob"].delete("/v1/requests/mine").status_code == 403
        assert clients["alice"].delete("/v1/requests/mine").status_code == 200
        assert asked.result() == 409
