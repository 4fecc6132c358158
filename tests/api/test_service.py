"""Everything around the images: health, models, metrics, request ids, errors, cancelling, the docs."""

from __future__ import annotations

import asyncio
import logging
import pickle

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from app.api.app import create_app
from app.errors import (
    BusyError,
    DeadlineImpossibleError,
    GenerationError,
    InvalidRequestError,
    RequestCancelledError,
    ServiceError,
    UnavailableError,
)
from app.settings import Settings
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}


async def _samples(client: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def _requests(outcome: str, status_class: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return "flux_requests_total", frozenset(
        {("model", "flux-tiny"), ("outcome", outcome), ("status_class", status_class)}
    )


async def test_health(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "model": "flux-tiny", "details": {"replicas": 1}}
    backend.ready = False
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"


async def test_models(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    listing = (await client.get("/v1/models")).json()
    assert listing["object"] == "list"
    (card,) = listing["data"]
    assert (card["id"], card["object"]) == ("flux-tiny", "model")
    assert (await client.get("/v1/models/flux-tiny")).json() == card
    named = create_app(Settings(served_model_name="acme/flux"), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(named), base_url="http://service") as other:
        assert (await other.get("/v1/models/acme/flux")).json()["id"] == "acme/flux"
        assert (await other.post(URL, json={**PROMPT, "model": "acme/flux"})).status_code == 200


async def test_the_index_names_endpoints_that_exist(client: httpx.AsyncClient) -> None:
    endpoints = (await client.get("/")).json()["endpoints"]
    for endpoint in endpoints:
        method, path = endpoint.split()
        response = await client.request(method, path)
        # Whatever else is wrong with so empty a request, it is the endpoint itself that says so.
        assert response.status_code != 405, endpoint
        assert response.status_code == 200 or response.json()["error"]["code"] != "unknown_url", endpoint


async def test_metrics_count_by_outcome_and_merge_the_coordinators(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    await client.post(URL, json={**PROMPT, "n": 2})
    await client.post(URL, json={})
    for error in (BusyError(3), UnavailableError(), GenerationError("the decoder failed")):
        with backend.failing(error):
            await client.post(URL, json=PROMPT)
    samples = await _samples(client)
    for outcome, status_class in (
        ("ok", "2xx"), ("invalid", "4xx"), ("busy", "4xx"), ("unavailable", "5xx"), ("failed", "5xx")
    ):  # fmt: skip
        assert samples[_requests(outcome, status_class)] == 1
    denoise = frozenset({("model", "flux-tiny"), ("phase", "denoise")})
    assert samples["flux_phase_duration_seconds_count", denoise] == 2
    assert samples["flux_phase_duration_seconds_sum", denoise] == pytest.approx(0.4)
    replica = frozenset({("model", "flux-tiny"), ("replica", "r0")})
    assert samples["flux_request_skip_ratio_count", replica] == 2
    assert samples["flux_request_skip_ratio_sum", replica] == pytest.approx(1.0)


async def test_metrics_survive_a_coordinator_that_is_down(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    with backend.failing(UnavailableError()):
        samples = await _samples(client)
    assert samples[_requests("ok", "2xx")] == 0
    assert not any(name.startswith("flux_request_skip_ratio") for name, _ in samples)


async def test_metrics_speak_openmetrics_when_asked(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize("given", ["abc-123", "a.b:c_d", "x" * 128])
async def test_a_sane_request_id_is_kept(
    client: httpx.AsyncClient, backend: FakeBackend, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="app.api"):
        response = await client.post(URL, json=PROMPT, headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == given
    assert backend.jobs[0].request_id == given
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("app.api")]
    assert len(lines) == 2
    assert all(given in line for line in lines)


@pytest.mark.parametrize("given", ["", "a b", "a\tb", "x" * 129, "é", "a/b", '"'])
async def test_another_request_id_is_replaced(client: httpx.AsyncClient, backend: FakeBackend, given: str) -> None:
    response = await client.post(URL, json={}, headers=[(b"X-Request-Id", given.encode("latin-1"))])
    assert response.status_code == 400
    assert len(response.headers["x-request-id"]) == 32


async def test_every_reply_has_a_request_id_once(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for path in ("/", "/health", "/metrics", "/v1/models", "/nowhere", "/docs"):
        assert len((await client.get(path)).headers.get_list("x-request-id")) == 1
    behind_proxy = create_app(Settings(), lambda: backend, id_added_in_front=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(behind_proxy), base_url="http://service") as other:
        assert "x-request-id" not in (await other.get("/health", headers={"X-Request-Id": "abc"})).headers
        assert "x-request-id" in (await other.get("/health", headers={"X-Request-Id": "a b"})).headers


async def test_busy_and_unavailable_say_when_to_come_back(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for error, status, code, seconds in (
        (BusyError(2.1), 429, "busy", "3"),
        (BusyError(0), 429, "busy", "1"),
        (UnavailableError(), 503, "unavailable", "5"),
    ):
        with backend.failing(error):
            response = await client.post(URL, json=PROMPT)
        assert response.status_code == status
        assert response.headers["retry-after"] == seconds
        assert response.json()["error"]["code"] == code


async def test_the_unforeseen_is_a_500_with_the_id_and_no_secrets(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with backend.failing(RuntimeError("secret detail")), caplog.at_level(logging.ERROR, logger="app.api"):
        response = await client.post(URL, json=PROMPT)
    assert response.status_code == 500
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert any("secret detail" in str(record.exc_info) for record in caplog.records)


async def test_a_cancelled_request_cancels_the_backend_and_is_counted(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.hold = True
    request = asyncio.create_task(client.post(URL, json=PROMPT))
    await asyncio.wait_for(backend.taken.wait(), 5)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert backend.cancelled == 1
    assert (await _samples(client))[_requests("cancelled", "4xx")] == 1


async def test_under_a_route_prefix_the_requests_are_counted_too(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app, root_path="/prefix")
    async with httpx.AsyncClient(transport=transport, base_url="http://service/prefix") as prefixed:
        assert (await prefixed.post(URL, json=PROMPT)).status_code == 200
        assert (await _samples(prefixed))[_requests("ok", "2xx")] == 1


async def test_the_openapi_document_is_whole(client: httpx.AsyncClient, app: FastAPI) -> None:
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    fields = schemas["ImagesRequest"]["properties"]
    assert {"prompt", "true_cfg_scale", "magcache", "seed"} <= set(fields)
    assert all(field["description"] for field in fields.values())
    text = str(document)
    for name in schemas:
        assert f"'#/components/schemas/{name}'" in text
    references = {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert references == set(schemas)
    post = document["paths"][URL]["post"]
    errors = {"400", "401", "404", "406", "409", "413", "415", "422", "429", "500", "503", "504"}
    assert set(post["responses"]) == {"200", *errors}
    images = {"image/png", "image/jpeg", "image/webp"}
    assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream", *images}
    assert "HTTPValidationError" not in text
    assert (await client.get("/docs")).status_code == 200


@pytest.mark.parametrize(
    "error",
    [
        BusyError(2.5),
        UnavailableError("starting"),
        GenerationError("decoder"),
        InvalidRequestError("bad", param="n", code="c", status=422, headers={"A": "b"}),
        DeadlineImpossibleError("too soon", soonest_s=1.5),
        RequestCancelledError("ended"),
    ],
)
def test_errors_survive_pickling(error: ServiceError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.envelope, copy.status, copy.headers, str(copy)) == (
        error.envelope, error.status, error.headers, str(error)
    )  # fmt: skip
