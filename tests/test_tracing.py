"""Traces: the caller's trace goes through us to whom we ask, and without the extra or an endpoint nothing is there."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from app.adapters.asking import Asker, Patience
from app.kernel import logs, tracing
from app.kernel.settings import Settings
from app.topups.gateway import GatewayUnavailable
from tests.door import JSON, opened
from tests.program import ROOT

TRACE: Final = "0af7651916cd43dd8448eb211c80319c"
PARENT: Final = f"00-{TRACE}-b7ad6b7169203331-01"


class Kept(SpanExporter):
    """An exporter that keeps what it is given."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Tracing on, into memory."""
    exporter = Kept()
    tracing.start("http-1", exporter)
    yield exporter
    tracing.stop()


@pytest.fixture
def asked() -> list[httpx.Request]:
    return []


def _asker(asked: list[httpx.Request], status: int = 200) -> Asker:
    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, json={})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return Asker("BTCPay", "https://btcpay.example", {}, client=client, patience=Patience(retries=0))


async def test_a_caller_s_trace_is_answered_logged_and_kept_for_the_hot_routes_too(
    clean: str, settings: Settings, kept: Kept
) -> None:
    printed = io.StringIO()
    with redirect_stderr(printed):
        logs.configure("INFO")
        async with opened(clean, settings) as door:
            service = await door.service()
            answer = await door.ask("GET", "/health/live", {"traceparent": PARENT})
            charge = b'{"request_id":"r","api_key":"sk-no","model":"m","cost_usd":1}'
            hot = await door.ask("POST", "/v1/meter/charge", service | JSON | {"traceparent": PARENT}, charge)
            alone = await door.ask("GET", "/health/live")
    assert answer.headers["traceparent"].split("-")[1] == TRACE
    assert hot.headers["traceparent"].split("-")[1] == TRACE
    assert alone.headers["traceparent"].split("-")[1] != TRACE
    assert answer.headers["x-request-id"] == TRACE
    told = [json.loads(line) for line in printed.getvalue().splitlines()]
    assert TRACE in {line.get("trace_id") for line in told if line["event"] == "request"}
    tracing.stop()
    names = [span.name for span in kept.spans]
    assert "GET /health/live" in names
    assert "POST /v1/meter/charge" in names
    parents = {span.parent.span_id for span in kept.spans if span.parent is not None}
    assert 0xB7AD6B7169203331 in parents


async def test_what_is_asked_for_a_request_carries_its_trace_below_its_span(
    kept: Kept, asked: list[httpx.Request]
) -> None:
    found = tracing.on()
    assert found is not None
    asker = _asker(asked)
    with found.serving({b"traceparent": PARENT.encode(), b"tracestate": b"vendor=1"}) as span:
        await asker.ask("GET", "/api/v1/stores/x/invoices/secret-invoice")
    carried = asked[0].headers["traceparent"].split("-")
    assert carried[1] == TRACE
    assert asked[0].headers["tracestate"] == "vendor=1"
    tracing.stop()
    question = next(each for each in kept.spans if each.name == "GET BTCPay")
    assert f"{question.context.span_id:016x}" == carried[2]
    assert question.parent is not None
    assert question.parent.span_id == span.get_span_context().span_id
    assert dict(question.attributes or {})["http.response.status_code"] == 200
    assert "secret-invoice" not in "".join(each.to_json() for each in kept.spans)


async def test_a_question_that_fails_is_a_span_without_what_was_in_it(kept: Kept, asked: list[httpx.Request]) -> None:
    asker = _asker(asked, status=503)
    with pytest.raises(GatewayUnavailable):
        await asker.ask("POST", "/pay", content=b"a secret body")
    tracing.stop()
    [span] = kept.spans
    assert dict(span.attributes or {})["http.response.status_code"] == 503
    assert "secret" not in span.to_json()


@pytest.mark.parametrize("parent", ["", "00-zz-yy-01", f"00-{'0' * 32}-b7ad6b7169203331-01", "x" * 5000, "é"])
async def test_a_malformed_traceparent_begins_a_trace_of_our_own(
    clean: str, settings: Settings, kept: Kept, parent: str
) -> None:
    async with opened(clean, settings) as door:
        answer = await door.ask("GET", "/health/live", {"traceparent": parent.encode("latin-1")})
    assert answer.status == 200
    assert len(answer.headers["traceparent"].split("-")[1]) == 32


async def test_without_an_endpoint_nothing_is_sent_along_and_nothing_answered(
    clean: str, settings: Settings, asked: list[httpx.Request]
) -> None:
    tracing.start("http")
    assert tracing.on() is None
    await _asker(asked).ask("GET", "/x")
    assert "traceparent" not in asked[0].headers
    async with opened(clean, settings) as door:
        assert "traceparent" not in (await door.ask("GET", "/health/live", {"traceparent": PARENT})).headers


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    code = "import sys, app.run; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    assert _python(code).stdout.strip() == "[]"


def test_an_endpoint_without_the_extra_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
from app.__main__ import start
sys.argv = ["satmeter", "run"]
sys.exit(start())
"""
    done = _python(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", DATA_DIR=str(tmp_path))
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("satmeter: OTEL_EXPORTER_OTLP_ENDPOINT is set")
    assert "deploy/requirements-tracing.txt" in line


def _python(code: str, **environ: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ) | environ, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
