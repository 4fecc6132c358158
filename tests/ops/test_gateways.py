"""The gateways' configurations agree with the settings, and say what they should when no service is there."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from app.api.access import PROXY_HEADERS
from app.settings import Settings
from scripts.envoy import GATEWAYS
from tests.gateways import gateway

LARGE = 5 << 20
"""Bytes of a body, beyond what the gateways keep by default."""


@pytest.mark.parametrize("name", ["nginx", "envoy"])
def test_without_a_service_clients_are_told_to_ask_again(name: str, tmp_path: Path) -> None:
    with gateway(name, "127.0.0.1:9", tmp_path) as (host, port):
        reply = httpx.get(f"http://{host}:{port}/health")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")


class Breaking(BaseHTTPRequestHandler):
    """Closes the first connection when it has read the request, and answers the next; keeps ids and sizes."""

    seen: ClassVar[list[tuple[str | None, int]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.headers["X-Request-Id"], len(body)))
        self.close_connection = True
        if len(self.seen) > 1:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.mark.parametrize("given", ["mine", "not an id"])
@pytest.mark.parametrize("name", ["nginx", "envoy"])
def test_a_request_whose_connection_breaks_comes_again(name: str, given: str, tmp_path: Path) -> None:
    class Service(Breaking):
        seen: ClassVar[list[tuple[str | None, int]]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        with gateway(name, f"127.0.0.1:{server.server_port}", tmp_path, proxies=2) as (host, port):
            reply = httpx.post(
                f"http://{host}:{port}/v1/images/edits", content=bytes(LARGE), headers={"X-Request-Id": given}
            )
        server.shutdown()
    assert reply.text == "ok"
    (request_id, size), again = Service.seen
    assert again == (request_id, size), "with the same id, by which it joins its images, and its whole body"
    assert size == LARGE
    assert request_id == given if given == "mine" else re.fullmatch(r"[0-9a-f-]{32,36}", str(request_id))


def test_they_know_the_headers_and_limits_of_the_service() -> None:
    nginx = (GATEWAYS / "nginx.conf").read_text(encoding="utf-8")
    envoy = (GATEWAYS / "envoy.yaml").read_text(encoding="utf-8")
    for header in PROXY_HEADERS:
        assert f'proxy_set_header {header.title()} "";' in nginx
        assert f"- {header}\n" in envoy
    most = Settings().http.max_edit_bytes
    assert f"client_max_body_size {most >> 20}m;" in nginx
    assert f"max_request_bytes: {most} " in envoy
