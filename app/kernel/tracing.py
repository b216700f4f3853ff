"""Traces for OpenTelemetry: what a request asked of others, under the id that its caller gave it.

Off, and nothing of it imported, unless OTEL_EXPORTER_OTLP_ENDPOINT is set; then the extra must be installed
(`pip install satmeter[tracing]`). A span has a route, a backend, a status; never an address's path, a header or a body.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

from app.kernel.settings import SettingsError

ENDPOINT: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's own variables, as are all the others that its SDK reads: name, headers, sampler."""
_CARRIED: Final = (b"traceparent", b"tracestate")


class Tracing:
    """One process's tracer. `exporter` None: as the environment says."""

    def __init__(self, process: str, exporter: Any = None) -> None:
        """Raises ImportError where the extra is not installed."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        names = {"service.instance.id": process} | (
            {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "satmeter"}
        )
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("satmeter")
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def serving(self, headers: Mapping[bytes, bytes]) -> Iterator[Any]:
        """A request's span, below its caller's if a `traceparent` came with it; what is asked meanwhile is below it."""
        from opentelemetry.trace import SpanKind

        carried = {name.decode(): headers[name].decode("latin-1") for name in _CARRIED if name in headers}
        parent = self._propagator.extract(carried)
        with self._tracer.start_as_current_span(
            "request", context=parent, kind=SpanKind.SERVER, record_exception=False
        ) as span:
            yield span

    @contextlib.contextmanager
    def asking(self, backend: str, method: str) -> Iterator[tuple[dict[str, str], Any]]:
        """A question's span, and the headers that carry it to whom is asked."""
        from opentelemetry.trace import SpanKind

        attributes = {"peer.service": backend, "http.request.method": method}
        with self._tracer.start_as_current_span(
            f"{method} {backend}", kind=SpanKind.CLIENT, attributes=attributes, record_exception=False
        ) as span:
            yield self.carried(), span

    def carried(self) -> dict[str, str]:
        """The headers of the span that we are in."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier

    def stop(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


_on: Tracing | None = None


def on() -> Tracing | None:
    """This process's tracing, None where there is none."""
    return _on


def start(process: str, exporter: Any = None) -> None:
    """From now on. Without an endpoint in the environment, nothing. Raises SettingsError where the extra is missing."""
    global _on
    name = next((name for name in ENDPOINT if os.environ.get(name)), None)
    if name is None and exporter is None:
        return
    try:
        _on = Tracing(process, exporter)
    except ImportError as error:
        raise SettingsError(
            f"{name} is set, but what sends traces is not installed: pip install --require-hashes -r deploy/requirements-tracing.txt"
        ) from error


def stop() -> None:
    global _on
    if _on is not None:
        tracing, _on = _on, None
        tracing.stop()


@contextlib.contextmanager
def asking(backend: str, method: str) -> Iterator[tuple[dict[str, str], Any]]:
    """A question to a backend: the headers to send along, none where there is no tracing, and its span."""
    if _on is None:
        yield {}, None
    else:
        with _on.asking(backend, method) as found:
            yield found
