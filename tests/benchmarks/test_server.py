"""A load on any server: what it is sent, and what is counted; the server here is a real one that makes no images."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.serve.server import size

Received = list[tuple[str, str | None, dict[str, Any]]]


@pytest.fixture
def server() -> Iterator[tuple[str, Received]]:
    """Its URL, and what it was sent: path, Authorization and body of each request; every fifth is refused."""
    received: Received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, self.headers["Authorization"], body))
            self.send_response(429 if len(received) % 5 == 0 else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            """Nothing: pytest has the output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", received
        http.shutdown()


@pytest.mark.parametrize("load", [["--clients", "3"], ["--rate", "200"]])
def test_a_load_on_a_server(
    load: list[str],
    server: tuple[str, Received],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, received = server
    monkeypatch.setenv("PEER_KEY", "sk-1")
    options = ["--model", "FLUX.1-dev", "--key-variable", "PEER_KEY", "--extra", '{"guidance_scale": 3.5}']
    kinds = ["--sizes", "1024x1024", "512x768", "--num-steps", "28", "--count", "18"]
    monkeypatch.setattr(sys, "argv", ["serving", "--url", f"{url}/", *options, *kinds, *load])
    assert serving.main() == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(last)
    assert (figures["requests"], figures["failed"]) == (18, 4), "two more came before, one of each size"
    assert {path for path, _, _ in received} == {"/v1/images/generations"}
    assert {key for _, key, _ in received} == {"Bearer sk-1"}
    bodies = [body for _, _, body in received]
    assert [body["size"] for body in bodies[:2]] == ["1024x1024", "512x768"]
    assert {body["size"] for body in bodies} == {"1024x1024", "512x768"}
    assert all((body["model"], body["guidance_scale"]) == ("FLUX.1-dev", 3.5) for body in bodies)
    assert len({body["prompt"] for body in bodies[2:]}) == 18


def test_a_size_is_two_numbers() -> None:
    assert size("1024x768") == (1024, 768)
    with pytest.raises(Exception, match="'1024' is no size such as 1024x1024"):
        size("1024")
