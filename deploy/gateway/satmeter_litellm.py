"""Satmeter for LiteLLM: what stands before its proxy, asks before each call, and tells afterwards what it came to.

LiteLLM loads it by its config (litellm.yaml beside this file). What decides about money stands at the edge, around LiteLLM's
whole application (app.client's Metered): what a caller sends reaches LiteLLM only when it is paid for, and what is charged
follows from the bytes that were answered. LiteLLM's own hooks miss calls (a completions stream that is left fires none), so
that they only add what the bytes do not say: which model served, how long a recording was, what the provider took.

    SATMETER_URL, SATMETER_TOKEN    where Satmeter is, and a service token (`python -m app token create --service litellm`)
    SATMETER_SPOOL                  a folder that survives a restart (./litellm-spool)
    SATMETER_MODE                   clamp (what cannot be paid whole is answered shorter) or strict

Tried with litellm[proxy] 1.106.2. `app.client` must be importable: PYTHONPATH=. from the repository's root.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

import msgspec
from fastapi import Request
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy import proxy_server
from litellm.proxy._types import ProxyException, UserAPIKeyAuth
from litellm.types.utils import all_litellm_params

from app.client import Allowed, Done, Meter, Usage, asked_of
from app.client.asked import Reading, form_fields, read_request
from app.client.metered import Metered, deny, fault

_CALLS: Final = (
    "chat/completions", "completions", "embeddings", "responses", "messages", "audio/speech", "audio/transcriptions",
    "images/generations",
)  # fmt: skip
_ALIVE: Final = "/health/liveliness"
SERVED: Final = frozenset(
    {("POST", f"{before}{call}") for before in ("/", "/v1/") for call in _CALLS if (before, call) != ("/", "messages")}
    | {("GET", "/models"), ("GET", "/v1/models"), ("GET", _ALIVE)}
)
"""All that there is: LiteLLM lets custom_auth's keys into its settings, its debugging and a health check that calls every
upstream. Paths are compared whole."""
_CONTROLS: Final = frozenset(all_litellm_params) | {
    "timeout", "base_url", "api_type", "organization", "extra_headers", "extra_body", "extra_query", "user_config",
    "drop_params", "additional_drop_params", "request_timeout", "stream_timeout", "web_search_options_override",
}  # fmt: skip
"""What in a body is said to LiteLLM and not to the model: keys and addresses, prices, retries and fallbacks, how long to
wait, whether to log. None of it is a caller's."""
_FORM_FIELDS: Final = frozenset({
    "file", "model", "language", "prompt", "response_format", "temperature", "timestamp_granularities[]",
    "timestamp_granularities", "include[]", "stream", "chunking_strategy",
})  # fmt: skip
_KEY_HEADERS: Final = (
    b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"ocp-apim-subscription-key", b"cookie",
)  # fmt: skip
_INTERNAL: Final = (
    b"x-litellm",
    b"llm_provider",
    b"llm-provider",
    b"server",
    b"x-ratelimit",
    b"x-request-id",
    b"set-cookie",
)
_TOLD_WITHIN_SECONDS: Final = 5.0
_ERRORS_BYTES: Final = 64 * 1024

Send = Callable[[Any], Awaitable[None]]


class Told(msgspec.Struct, frozen=True):
    """What LiteLLM says of a call in its log."""

    has_run: bool
    is_refusal: bool = False
    """The upstream answered with an error's status, or was not reached: not too late, and not in the middle of an answer."""
    model: str | None = None
    provider: str | None = None
    usage: Usage | None = None
    cost_usd: Decimal | None = None
    audio_seconds: float | None = None


class Edge:
    """What stands around LiteLLM's application: which paths there are, what is said to it, what is heard of it."""

    def __init__(self, litellm: Any, meter: Meter, mode: Any) -> None:
        self._litellm, self._meter = litellm, meter
        self._metered = Metered(
            self._inward, meter, free=(_ALIVE,), read=self._read, mode=mode, hidden=("cost",), finish=self._finish
        )
        self._told: dict[str, asyncio.Future[Told]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and (scope["method"], scope["path"]) not in SERVED:
            await deny(fault(404, "not_found", "There is no such path here"), scope["path"], send)
            return
        await self._metered(scope, receive, _Outward(send, scope.get("path", "")))

    async def close(self) -> None:
        await self._metered.finished()
        await self._meter.close()

    def tell(self, request_id: str, told: Told) -> None:
        """A call that failed once may succeed yet (a retry, a fallback): what has run counts."""
        waiting = self._told.get(request_id)
        if waiting is None:
            return
        if waiting.done() and told.has_run and not waiting.result().has_run:
            waiting = self._told[request_id] = asyncio.get_running_loop().create_future()
        if not waiting.done():
            waiting.set_result(told)

    # --- inwards ---

    async def _inward(self, scope: Any, receive: Any, send: Any) -> None:
        """LiteLLM sees no key of a caller's, and nothing that tells it what to do."""
        headers = [each for each in scope["headers"] if not _is_private(each[0].lower())]
        headers.append((b"authorization", b"Bearer sk-satmeter"))
        allowed, statuses = scope.get("satmeter"), scope.setdefault("satmeter_statuses", [])
        if isinstance(allowed, Allowed):
            self._told[allowed.request_id] = asyncio.get_running_loop().create_future()

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        await self._litellm({**scope, "headers": headers, "satmeter_edge": True}, receive, sending)

    def _read(self, path: str, content_type: str, raw: bytes) -> Reading | None:
        reading = read_request(path, content_type, raw)
        if reading is None or reading.body is None:
            fields = form_fields(content_type, raw) if reading is not None else {}
            return reading if set(fields) <= _FORM_FIELDS else None
        body = {name: value for name, value in reading.body.items() if name not in _CONTROLS and name[:1] != "_"}
        return Reading(asked_of(path, {**body, "model": _upstream_model(body.get("model"))}), body)

    # --- afterwards ---

    async def _finish(self, scope: Any, done: Done) -> Done | None:
        """What the bytes say, with what LiteLLM says where they do not. None: it was refused before it ran."""
        request_id = scope["satmeter"].request_id
        try:
            async with asyncio.timeout(_TOLD_WITHIN_SECONDS):
                told = await self._heard(request_id)
        except TimeoutError:  # some calls that are left are never told of
            return done
        finally:
            self._told.pop(request_id, None)
        if not told.has_run:
            return None if told.is_refusal and scope["satmeter_statuses"][0] >= 400 else done
        return _with(done, told)

    async def _heard(self, request_id: str) -> Told:
        told = await asyncio.shield(self._told[request_id])
        await asyncio.sleep(0)
        return self._told[request_id].result() if self._told[request_id].done() else told


class _Outward:
    """An answer on its way to the caller: without LiteLLM's headers, its errors without what is inside."""

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self._error: Any = None
        self._body = bytearray()
        self._is_stream = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {
                **message,
                "headers": [each for each in message["headers"] if not each[0].lower().startswith(_INTERNAL)],
            }
            is_litellms = any(name == b"x-billing-request-id" for name, _ in message["headers"])
            if message["status"] >= 400 and is_litellms:
                self._error = message
                return
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
        elif message["type"] == "http.response.body" and self._error is not None:
            self._body += message.get("body", b"")[: _ERRORS_BYTES - len(self._body)]
            if not message.get("more_body", False):
                await self._refuse()
            return
        elif self._is_stream and b'"error"' in message.get(
            "body", b""
        ):  # each piece is of whole events: see Metered's `hidden`
            message = {**message, "body": b"\n\n".join(map(_shown, message["body"].split(b"\n\n")))}
        await self._send(message)

    async def _refuse(self) -> None:
        status, headers = self._error["status"], dict(self._error["headers"])
        refusal = _refusal(status, bytes(self._body), headers.get(b"retry-after", b"").decode("latin-1"))
        refusal = msgspec.structs.replace(
            refusal, headers={**refusal.headers, "x-billing-request-id": headers[b"x-billing-request-id"].decode()}
        )
        await deny(refusal, self._path, self._send)


def _shown(event: bytes) -> bytes:
    """An event of a stream; of one that says what went wrong, that it did."""
    before, data, after = event.partition(b"data:")
    try:
        read = msgspec.json.decode(after) if b'"error"' in after else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return event
    told = [place["error"] for place in _places(read) if isinstance(place.get("error"), dict)]
    for error in told:
        error["message"] = "The model's provider failed"
    return before + data + b" " + msgspec.json.encode(read) if told else event


def _places(read: Any) -> list[dict[str, Any]]:
    return (
        [place for place in (read, read.get("response")) if isinstance(place, dict)] if isinstance(read, dict) else []
    )


def _refusal(status: int, body: bytes, retry_after: str) -> Any:
    """A caller's own mistake as it was said; what is wrong with a provider, our key there, or how long it took: 502."""
    if status == 429:
        seconds = int(retry_after) if retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 6 else 1
        return fault(429, "rate_limit_exceeded", "The model's provider is busy", retry_after=max(1, seconds))
    if status in (400, 404, 413, 422):
        return fault(status, "model_not_found" if status == 404 else "upstream_refused", _cleaned(body))
    return fault(502, "upstream_error", "The model's provider failed", upstream_status=status)


def _cleaned(body: bytes) -> str:
    """What a caller may read of LiteLLM's message: no address, no key, nothing of how it is set up."""
    try:
        read = msgspec.json.decode(body)
        error = read.get("error", read) if isinstance(read, dict) else {}
        message = str(error.get("message", "")) if isinstance(error, dict) else str(error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = ""
    message = re.split(r"\s*(?:Received Model Group|Available Model Group|LiteLLM Retried|LiteLLM:)", message)[0]
    message = re.sub(r"^(?:litellm\.)?\w+Error: (?:\w+(?:Exception|Error)? - )?", "", message)
    return _PRIVATE.sub("…", message).strip()[:500] or "The request was refused"


_PRIVATE: Final = re.compile(
    r"https?://\S+|\b(?:sk|pk|key|gsk|xai)-[\w*.-]{4,}|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b", re.I
)


def _is_private(name: bytes) -> bool:
    return name in _KEY_HEADERS or name.replace(b"_", b"-").startswith(
        (b"x-litellm", b"litellm-", b"x-mcp-", b"langfuse")
    )


def _upstream_model(name: Any) -> Any:
    """By what name the call is priced: that of the model behind an alias of LiteLLM's."""
    router = proxy_server.llm_router
    if router is None or not isinstance(name, str):
        return name
    group = (router.model_group_alias or {}).get(name, name)
    group = group.get("model", name) if isinstance(group, Mapping) else group
    for deployment in router.model_list or ():
        if deployment.get("model_name") == group:
            return _priced_as(deployment["litellm_params"]["model"])
    return name


def _priced_as(model: str) -> str:
    """`openai/` is a wire, which many servers speak: whose model it is, it does not say."""
    wire, _, rest = model.partition("/")
    return rest if rest and wire in _WIRES else model


_WIRES: Final = ("openai", "custom_openai", "openai_like", "text-completion-openai", "hosted_vllm", "litellm_proxy")


def _with(done: Done, told: Told) -> Done:
    usage = done.usage
    if told.usage is not None and done.usage_estimated and (usage is None or _is_more(told.usage, usage)):
        usage = told.usage
    if told.audio_seconds is not None:
        usage = Usage(audio_seconds=told.audio_seconds)
    return msgspec.structs.replace(
        done, usage=usage, served_model=told.model or done.served_model, provider=told.provider,
        provider_cost_usd=told.cost_usd, usage_estimated=done.usage_estimated and told.audio_seconds is None,
    )  # fmt: skip


def _is_more(told: Usage, counted: Usage) -> bool:
    return (told.output_tokens or 0) > (counted.output_tokens or 0)


# --- what LiteLLM loads ---


class _PROXY_Satmeter(CustomLogger):
    """Hears what LiteLLM knows of a call when it is over. It is named so that LiteLLM tells it whatever a body says."""

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self._tell(kwargs, response_obj, has_run=True)

    async def async_log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self._tell(kwargs, None, has_run=False)

    def _tell(self, kwargs: Any, response: Any, *, has_run: bool) -> None:
        logged = kwargs.get("standard_logging_object") or {}
        request_id = ((logged.get("metadata") or {}).get("user_api_key_auth_metadata") or {}).get("satmeter")
        if request_id is None:
            return
        error = str((logged.get("error_information") or {}).get("error_code") or "")
        seconds = getattr(response, "duration", None)
        model, provider = logged.get("model") or None, logged.get("custom_llm_provider") or None
        edge().tell(request_id, Told(
            has_run=has_run, is_refusal=error.isdigit() and error != "408", model=_priced_as(model) if model else None,
            provider=None if provider in _WIRES else provider, usage=_counted(logged), cost_usd=_decimal(logged.get("response_cost")),
            audio_seconds=float(seconds) if isinstance(seconds, int | float) else None,
        ))  # fmt: skip


def _counted(logged: Mapping[str, Any]) -> Usage | None:
    sent, answered = logged.get("prompt_tokens"), logged.get("completion_tokens")
    return Usage(sent, answered) if isinstance(sent, int) and isinstance(answered, int) and sent + answered else None


def _decimal(cost: Any) -> Decimal | None:
    try:
        return Decimal(str(cost)) if cost is not None else None
    except InvalidOperation:
        return None


async def custom_auth(request: Request, api_key: str) -> UserAPIKeyAuth:
    """Nobody comes here but through the edge, which has asked Satmeter; what is not of it is refused."""
    if not request.scope.get("satmeter_edge"):
        raise ProxyException(message="not metered", type="authentication_error", param=None, code=401)
    allowed = request.scope.get("satmeter")
    if not isinstance(allowed, Allowed):
        return UserAPIKeyAuth(token=hashlib.sha256(b"reads").hexdigest())
    token = hashlib.sha256(allowed.key_id.encode()).hexdigest()
    return UserAPIKeyAuth(token=token, user_id=allowed.account_id, metadata={"satmeter": allowed.request_id})


def edge() -> Edge:
    """The one edge of this process. LiteLLM loads this file once for custom_auth and once for callbacks, so that what they
    share is kept by its application."""
    app = proxy_server.app
    if not hasattr(app.state, "satmeter"):
        app.state.satmeter = _around(app)
    made: Edge = app.state.satmeter
    return made


def _around(app: Any) -> Edge:
    missing = [name for name in ("SATMETER_URL", "SATMETER_TOKEN") if not os.environ.get(name)]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} must be set; see deploy/gateway/litellm.yaml")
    spool = Path(os.environ.get("SATMETER_SPOOL", "litellm-spool"))
    meter = Meter(os.environ["SATMETER_URL"], os.environ["SATMETER_TOKEN"], spool=spool)
    meter.open()
    mode = os.environ.get("SATMETER_MODE", "clamp")
    if mode not in ("clamp", "strict"):
        raise RuntimeError(f"SATMETER_MODE is {mode!r}; it may be clamp or strict")
    made = Edge(app.middleware_stack or app.build_middleware_stack(), meter, mode)
    app.middleware_stack = made
    before = proxy_server.proxy_shutdown_event

    async def ending(*args: Any, **named: Any) -> None:
        await made.close()
        await before(*args, **named)

    proxy_server.proxy_shutdown_event = ending
    return made


edge()
satmeter = _PROXY_Satmeter()
