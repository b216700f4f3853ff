"""Each request as a span, where traces are kept; where they are not, nothing stands here."""

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.kernel import tracing

_FAILED = 500


def traced(app: ASGIApp) -> ASGIApp:
    """The application within spans, or itself."""
    found = tracing.on()
    if found is None:
        return app
    kept = found

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        with kept.serving(dict(scope["headers"])) as span:
            trace_id = scope.setdefault("state", {})["trace_id"] = f"{span.get_span_context().trace_id:032x}"
            structlog.contextvars.bind_contextvars(trace_id=trace_id)
            back = [(name.encode(), value.encode()) for name, value in kept.carried().items()]

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), *back]
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= _FAILED:
                        span.set_attribute("error.type", str(message["status"]))
                await send(message)

            try:
                await app(scope, receive, sending)
            finally:
                route = scope.get("path_template") or "unmatched"
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
                span.set_attribute("http.request.method", scope["method"])

    return wrapped
