"""The request id of log lines, and OpenTelemetry spans of requests and their phases.

Spans are created when a request ends, from the times that its phases reported; steps cost nothing extra. OpenTelemetry
is needed only where an endpoint is configured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from app.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that the current task works for."""

Attributes = Mapping[str, str | int | float]


class Tracing:
    """Spans of requests and images; none without an endpoint."""

    def __init__(self, settings: Settings) -> None:
        """Raises:
        ValueError: an endpoint is set and OpenTelemetry is not installed.
        """
        endpoint = settings.telemetry.otlp_endpoint
        self._provider = None if endpoint is None else _provider(endpoint, settings.model_name)
        self._tracer = None if self._provider is None else self._provider.get_tracer("flux-magcache-serve")

    @contextlib.contextmanager
    def request(
        self, route: str, headers: Mapping[str, str], attributes: Attributes
    ) -> Iterator[Callable[[int], None]]:
        """A span around one HTTP request, below the caller's if ``headers`` name one; its images' spans are below it.

        Yields:
            A function to call with the reply's status.
        """
        if self._tracer is None:
            yield lambda status: None
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        with self._tracer.start_as_current_span(
            f"POST {route}",
            context=context,
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": route, **attributes},
        ) as span:

            def ended(status: int) -> None:
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)

            yield ended

    def image(
        self,
        *,
        queue_s: float,
        encode_s: float,
        denoise_s: float,
        decode_s: float,
        total_s: float,
        attributes: Attributes,
    ) -> None:
        """Spans of an image that was just finished and of its phases, below the current request's."""
        if self._tracer is None:
            return
        from opentelemetry.trace import set_span_in_context

        end = time.time_ns()
        start = end - _ns(total_s)
        image = self._tracer.start_span("picture", start_time=start, attributes=attributes)
        context = set_span_in_context(image)
        moment = start
        for phase, seconds in (("encode", encode_s), ("queue", queue_s), ("denoise", denoise_s)):
            span = self._tracer.start_span(phase, context, start_time=moment)
            moment += _ns(seconds)
            span.end(moment)
        # The gap between the last step and the decoder is the transfer of the latents.
        self._tracer.start_span("decode", context, start_time=end - _ns(decode_s)).end(end)
        image.end(end)

    def close(self) -> None:
        """Send the remaining spans, and stop."""
        if self._provider is not None:
            self._provider.shutdown()


def _provider(endpoint: str, model: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ValueError(
            f"telemetry.otlp_endpoint is {endpoint!r} and {error.name} is not installed; "
            "`pip install 'flux-magcache-serve[otlp]'`, or set it to null"
        ) from error
    resource = Resource.create({"service.name": "flux-magcache-serve", "flux.model": model})
    # A provider of our own: Ray may set the global one.
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    return provider


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
