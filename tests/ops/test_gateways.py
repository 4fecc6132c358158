"""The gateways' configurations agree with the settings, and say what they should when no service is there."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from app.api.access import PROXY_HEADERS
from app.settings import Settings
from tests.gateways import GATEWAYS, gateway


@pytest.mark.parametrize("name", ["nginx", "envoy"])
def test_without_a_service_clients_are_told_to_ask_again(name: str, tmp_path: Path) -> None:
    with gateway(name, "127.0.0.1:9", tmp_path) as (host, port):
        reply = httpx.post(f"http://{host}:{port}/v1/images/generations", json={"prompt": "a red circle"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")


def test_they_know_the_headers_and_limits_of_the_service() -> None:
    nginx = (GATEWAYS / "nginx.conf").read_text(encoding="utf-8")
    envoy = (GATEWAYS / "envoy.yaml").read_text(encoding="utf-8")
    for header in PROXY_HEADERS:
        assert f'proxy_set_header {header.title()} "";' in nginx
        assert f"- {header}\n" in envoy
    most = Settings().http.max_edit_bytes
    assert f"client_max_body_size {most >> 20}m;" in nginx
    assert f"max_request_bytes: {most} " in envoy
