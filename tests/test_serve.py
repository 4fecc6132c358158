"""``python -m app.serve`` as a real process: what SIGTERM does to requests under way and to later ones."""

from __future__ import annotations

import io
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from app.serve import PROXY_CHECK
from tests.service_process import service_process, wait_until

pytestmark = pytest.mark.faults

IMAGES = "/v1/images/generations"
LONG = {"prompt": "a red circle", "num_inference_steps": 60, "magcache": {"enabled": False}, "response_format": "file"}


def test_sigterm_loses_no_image(tmp_path: Path) -> None:
    with (
        service_process(tmp_path, drain_seconds=60.0, tensor_parallel_size=1) as service,
        ThreadPoolExecutor(6) as pool,
    ):
        under_way = [pool.submit(service.client.post, IMAGES, json=LONG | {"seed": seed}) for seed in range(6)]
        wait_until(lambda: service.metric("flux_running_pictures") == 6)
        (raylet,) = (each for each in service.processes() if each.name() == "raylet")
        assert raylet.environ().items() >= PROXY_CHECK.items(), "Serve's controller inherits it"
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: service.health() == 503)
        assert not any(each.done() for each in under_way)
        refused = service.client.post(IMAGES, json=LONG)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the service is stopping; ask again"
        assert int(refused.headers["retry-after"]) >= 1
        for reply in (each.result() for each in under_way):
            assert reply.status_code == 200
            Image.open(io.BytesIO(reply.content)).load()
        assert service.process.wait(60) == 0, service.log.read_text()
        wait_until(lambda: not service.processes())
