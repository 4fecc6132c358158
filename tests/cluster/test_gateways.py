"""The service behind nginx and behind Envoy, with the configurations that it ships, and what its own proxy refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests import raw_http
from tests.cluster.asking import IMAGES, PROMPT, events_of, metrics
from tests.gateways import gateway
from tests.patience import ANSWER_S, wait_for

QUICK = json.dumps({"prompt": PROMPT, "num_inference_steps": 1}).encode()
LONG = {"prompt": PROMPT, "num_inference_steps": 100, "n": 4, "magcache": {"enabled": False}}
RAY_DECODES = [b"X-Request-Id", b"Serve-Multiplexed-Model-Id", b"X-Session-Id", b"traceparent"]
OPERATORS = [b"X-Request-Disconnect-Disabled: ?1", b"X-Request-Timeout-Seconds: 0.001"]


@pytest.fixture(scope="module", params=["nginx", "envoy"])
def address(
    request: pytest.FixtureRequest, service: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    folder = tmp_path_factory.mktemp(request.param)
    with gateway(request.param, service.removeprefix("http://"), folder) as address:
        yield address


@pytest.fixture
def through(address: tuple[str, int]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url="http://{}:{}".format(*address), timeout=ANSWER_S) as client:
        yield client


@pytest.mark.parametrize("name", [*RAY_DECODES, b"User-Agent"])
def test_without_a_gateway_bytes_that_are_no_utf8_are_refused(service: str, name: bytes) -> None:
    host, _, port = service.removeprefix("http://").partition(":")
    status, headers, body = raw_http.post((host, int(port)), IMAGES, QUICK, name + b": caf\xe9")
    assert status == 400, body
    assert json.loads(body)["error"]["param"] == name.decode().lower()
    assert headers["x-request-id"]


@pytest.mark.parametrize("name", RAY_DECODES)
def test_bytes_that_are_no_utf8_stay_at_the_gateway(address: tuple[str, int], name: bytes) -> None:
    status, headers, _ = raw_http.post(address, IMAGES, QUICK, name + b": caf\xe9")
    assert status == 200
    assert headers["x-request-id"].isascii()


def test_headers_of_the_operators_stay_at_the_gateway(address: tuple[str, int]) -> None:
    status, _, body = raw_http.post(address, IMAGES, QUICK, *OPERATORS, b"Serve_Multiplexed_Model_Id: a")
    assert status == 200, body


def test_a_clients_id_passes(through: httpx.Client) -> None:
    replies = [through.get("/v1/models", headers={"X-Request-Id": f"my.id:{index}"}) for index in range(2)]
    assert [reply.headers["x-request-id"] for reply in replies] == ["my.id:0", "my.id:1"]


def test_a_stream_is_not_held_back_and_ends_with_its_client(through: httpx.Client, http: httpx.Client) -> None:
    with through.stream("POST", IMAGES, json=LONG | {"stream": True, "progress": True}) as reply:
        events = events_of(reply)
        while next(events)["step"] == 0:
            pass
        assert metrics(http)["flux_running_pictures"] > 0, "they run when the event of a step is here"
        assert next(events)["type"] == "flux.progress"
    wait_for(lambda: metrics(http)["flux_running_pictures"] == 0, "the images have ended")


def test_too_large_a_body_is_refused_in_the_envelope(through: httpx.Client) -> None:
    reply = through.post("/v1/images/edits", content=b"\0" * ((32 << 20) + 1), headers={"Content-Type": "text/plain"})
    assert reply.status_code == 413
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/metrics", "/-/routes", "/-/healthz", "//metrics", "/metrics/", "/x/../metrics"])
def test_what_is_for_operators_is_not_there(address: tuple[str, int], path: str) -> None:
    with httpx.Client(base_url="http://{}:{}".format(*address)) as client:
        reply = client.get(httpx.URL(client.base_url, raw_path=path.encode()))
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "invalid_request_error"
