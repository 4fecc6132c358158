"""A real collector's endpoint receives what the real exporter sends: a span per request, image and phase."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app.api.app import create_app
from app.settings import Settings, TelemetrySettings
from app.telemetry import Tracing
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
BODY = {"prompt": "a red circle", "n": 2}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


class Collector:
    """Listens as a collector does and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                message = ExportTraceServiceRequest()
                message.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in message.resource_spans:
                    named = {each.key: each.value.string_value for each in resource.resource.attributes}
                    collector.services.add(named["service.name"])
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, daemon=True)
    thread.start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()
    thread.join()


async def spans_of(
    collector: Collector, backend: FakeBackend, bodies: Sequence[Mapping[str, Any]], **headers: str
) -> None:
    """Serve ``bodies``, one after another, and have all spans sent."""
    app = create_app(Settings(telemetry=TelemetrySettings(otlp_endpoint=collector.url)), lambda: backend)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        for body in bodies:
            await client.post(URL, json=body)
        await client.get("/health")
    app.state.service.tracing.close()


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


async def test_a_request_has_a_span_and_its_images_phases_below_it(collector: Collector, backend: FakeBackend) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    await spans_of(collector, backend, [BODY], **{"X-Request-Id": "req-1", "traceparent": f"00-{trace}-{parent}-01"})
    assert collector.services == {"flux-magcache-serve"}
    assert {span.trace_id.hex() for span in collector.spans} == {trace}
    (request,) = collector.named(f"POST {URL}")
    assert request.parent_span_id.hex() == parent
    assert attributes(request)["http.response.status_code"] == 200
    assert attributes(request)["flux.request_id"] == "req-1"
    images = collector.named("picture")
    assert len(images) == 2
    for image in images:
        assert image.parent_span_id == request.span_id
        assert attributes(image)["flux.request_id"] == "req-1"
        assert attributes(image)["flux.schedule"]
        phases = {span.name: span for span in collector.spans if span.parent_span_id == image.span_id}
        assert set(phases) == {"queue", "encode", "denoise", "decode"}
        # The fake backend's image was denoised for 0.2 s.
        denoise = phases["denoise"]
        assert denoise.end_time_unix_nano - denoise.start_time_unix_nano == pytest.approx(0.2e9)
        assert phases["encode"].start_time_unix_nano == image.start_time_unix_nano
        assert phases["encode"].end_time_unix_nano == phases["queue"].start_time_unix_nano
        assert phases["queue"].end_time_unix_nano == denoise.start_time_unix_nano
        assert phases["decode"].end_time_unix_nano == image.end_time_unix_nano


async def test_streamed_images_belong_to_their_request(collector: Collector, backend: FakeBackend) -> None:
    await spans_of(collector, backend, [{"prompt": "a", "stream": True}])
    (request,) = collector.named(f"POST {URL}")
    (image,) = collector.named("picture")
    assert image.parent_span_id == request.span_id


async def test_refused_requests_have_a_span_and_probes_none(collector: Collector, backend: FakeBackend) -> None:
    await spans_of(collector, backend, [{"prompt": ""}])
    assert [attributes(span)["http.response.status_code"] for span in collector.spans] == [400]


def test_without_an_endpoint_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_opentelemetry(monkeypatch)
    tracing = Tracing(Settings())
    with tracing.request(URL, {}, {}) as ended:
        ended(200)
    tracing.close()


def test_an_endpoint_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_opentelemetry(monkeypatch)
    with pytest.raises(ValueError, match=r"otlp_endpoint is 'http://c:4318' and opentelemetry.*\[otlp\]"):
        Tracing(Settings(telemetry=TelemetrySettings(otlp_endpoint="http://c:4318")))


def _without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
