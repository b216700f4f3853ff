"""An offline upstream: answers every call to a model in the shapes that providers use, and no model is in it.

`create_models()` gives the ASGI application; serve it on a loopback port. It speaks OpenAI's wire (chat completions,
completions, responses, embeddings, speech, transcriptions, images, videos, models), Anthropic's messages and their
counting, and Exa's search, with `/v1` before the path or without. Whatever model is named answers. Words, tokens,
sounds and pictures come of the request alone: the same call costs the same. Any key will do, but there must be one.

How a call is answered is ordered as `answers/orders.py` says: by the model's name (`gpt-4o-mini+cut=3`), an `x-sandbox`
header, `[sandbox: cut=3]` in a prompt, or the driver:

    GET    /sandbox/log?after=N      {"rows": [...], "last": N}: every call with what it used, `answers/wire.py`'s Row
    DELETE /sandbox/log              forget them
    POST   /sandbox/orders           {"order": "status=429", "model"?: …, "path"?: "/chat/completions", "times"?: 1}
    DELETE /sandbox/orders           forget those that wait
    GET    /sandbox/files/{name}     a picture that an answer pointed to
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs

import msgspec

from .answers import orders
from .answers.audio import answer_speech, answer_transcription
from .answers.chat import answer_chat, answer_completion
from .answers.diary import Diary
from .answers.images import Files, answer_images
from .answers.messages import answer_message, count_tokens
from .answers.orders import BadOrder, Order
from .answers.prompts import Seen, words_of
from .answers.responses import Responses, answer_response
from .answers.search import answer_search
from .answers.vectors import answer_embeddings
from .answers.videos import Job, Jobs, list_videos, poll_video, send_video, start_video
from .answers.wire import (
    Answer,
    Call,
    Delivery,
    Piece,
    Receive,
    Row,
    Scope,
    Send,
    Unreadable,
    json_answer,
    read_call,
    refusal,
)
from .store import Store

MODELS: Final = {
    "openai": (
        "gpt-4o-mini", "gpt-4o", "gpt-4-turbo", "gpt-3.5-turbo", "gpt-4.1", "gpt-4.1-mini", "gpt-5", "gpt-5-mini",
        "text-embedding-3-small", "text-embedding-3-large", "tts-1", "tts-1-hd", "whisper-1", "dall-e-3",
        "gpt-image-1", "gpt-image-1.5", "sora-2", "sora-2-i2v", "sora-2-pro", "sora-2-pro-i2v",
    ),
    "anthropic": (
        "claude-3-haiku", "claude-3.5-sonnet", "claude-haiku-4-5", "claude-sonnet-4-5", "claude-sonnet-4-6",
        "claude-opus-4-5",
    ),
    "google": ("gemini-2.5-pro", "gemini-2.5-flash", "nano-banana-pro", "veo3", "veo3-fast", "veo3-i2v"),
    "mistral": ("mistral-large-latest", "mistral-small-latest", "codestral-latest"),
    "groq": ("llama-3.1-8b",),
    "pureai": ("gemma-3-4b-it", "DeepSeek-R1-Distill-Llama-8B"),
    "deepgram": ("deepgram_aura_2", "nova-3", "nova-2"),
    "black-forest-labs": ("flux-2-pro", "flux-2-flex", "flux-2-pro-i2i", "flux-kontext-pro", "flux-kontext-max"),
    "kling": (
        "kling-2.1-pro", "kling-2.1-master", "kling-2.1-master-i2v", "kling-2.5-turbo", "kling-2.5-turbo-i2v",
    ),
    "runway": ("runway-gen4", "runway-aleph"),
}  # fmt: skip
"""What is listed; others answer too."""
_SINCE: Final = 1_767_225_600
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class _Waiting(msgspec.Struct):
    """An order of the driver's that waits for its calls."""

    order: str
    model: str | None = None
    path: str | None = None
    times: int = 1

    def fits(self, call: Call) -> bool:
        is_path = self.path is None or call.path.endswith(self.path)
        return is_path and (self.model is None or call.model.partition("+")[0] == self.model)


@dataclass(slots=True)
class Upstream:
    """All that the offline upstream remembers."""

    diary: Diary
    store: Store | None
    seen: Seen = field(default_factory=Seen)
    responses: Responses = field(default_factory=dict)
    jobs: Jobs = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    waiting: list[_Waiting] = field(default_factory=list)


def create_models(state_dir: Path | None = None) -> ASGIApp:
    """The application. With a folder, its log and its video jobs outlive a kill; else they are in memory alone."""
    store = None if state_dir is None else Store(state_dir)
    upstream = Upstream(Diary(state_dir), store)
    if store is not None:
        upstream.jobs = {job.id: job for job in store.every("videos", Job)}

    async def models(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            async with _running(upstream):
                await _live(receive, send)
        elif scope["type"] == "http":
            await _answer(upstream, scope, receive, send)

    return models


@asynccontextmanager
async def _running(upstream: Upstream) -> AsyncIterator[None]:
    try:
        yield
    finally:
        upstream.diary.close()


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _answer(upstream: Upstream, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        call = await read_call(scope, receive)
    except ConnectionAbortedError:
        return
    except Unreadable as problem:
        call = Call(scope["method"], scope["path"], {}, "", "")
        await _deliver(upstream, call, refusal(400, str(problem)), orders.PLAIN, receive, send)
        return
    if call.path.startswith("/sandbox/"):
        answer = _drive(upstream, call)
        await Delivery(answer, orders.PLAIN, Row(0, 0, call.method, call.path, "driver"), receive, send).run()
        return
    try:
        order = _order_of(upstream, call)
    except BadOrder as problem:
        await _deliver(upstream, call, refusal(400, str(problem), "model"), orders.PLAIN, receive, send)
        return
    await _deliver(upstream, call, None, order, receive, send)


async def _deliver(
    upstream: Upstream, call: Call, answer: Answer | None, order: Order, receive: Receive, send: Send
) -> None:
    """Answer a call, and note before and after what became of it."""
    row = upstream.diary.begin(call, order)
    answer = answer or _understood(upstream, call, order)
    row.id, row.counts, row.status, row.is_stream = answer.id, answer.counts, answer.status, answer.is_stream
    row.usage, row.attributes = dict(answer.usage) if answer.usage else None, dict(answer.attributes)
    upstream.diary.write(row)
    accepts_gzip = "gzip" in call.headers.get("accept-encoding", "")
    try:
        await Delivery(answer, order, row, receive, send, accepts_gzip).run()
    finally:
        upstream.diary.write(row)


def _order_of(upstream: Upstream, call: Call) -> Order:
    """All that was ordered of this call. The model's name has no order in it afterwards. Raises BadOrder."""
    texts = []
    waiting = next((each for each in upstream.waiting if each.fits(call)), None)
    if waiting is not None:
        texts.append(waiting.order)
        waiting.times -= 1
        if waiting.times < 1:
            upstream.waiting.remove(waiting)
    texts.append(call.headers.get("x-sandbox", ""))
    if "+" in call.model:
        call.fields["model"], by_name = orders.in_model(call.model)
        texts += by_name
    return orders.read([*texts, *orders.in_prompt(words_of(call.fields))])


def _understood(upstream: Upstream, call: Call, order: Order) -> Answer:
    """The answer, or 400 for fields of a kind that no provider takes."""
    try:
        return _routed(upstream, call, order)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        return refusal(400, f"Invalid type in your request: {problem}")


# --- which answer ---------------------------------------------------------------------------------


def _routed(upstream: Upstream, call: Call, order: Order) -> Answer:
    path = call.path.removeprefix("/v1")
    is_anthropic = path.startswith("/messages") or "anthropic-version" in call.headers
    problem = _refused(call, path, order, is_anthropic)
    if problem is not None:
        return problem
    answer = _made(upstream, call, path, order) if call.method == "POST" else _found(upstream, call, path)
    return answer or refusal(404, f"Invalid URL ({call.method} {call.path})", code="unknown_url")


def _made(upstream: Upstream, call: Call, path: str, order: Order) -> Answer | None:
    if path == "/search":
        return answer_search(call, order)
    if not call.model:
        return refusal(400, "you must provide a model parameter", "model")
    if path in ("/images/generations", "/images/edits"):
        return answer_images(call, order, upstream.files)
    if path == "/videos":
        answer = start_video(call, order, upstream.jobs)
        _keep_job(upstream, answer.id)
        return answer
    if path == "/responses":
        return answer_response(call, order, upstream.seen, upstream.responses)
    if path in _REMEMBERING:
        return _REMEMBERING[path](call, order, upstream.seen)
    return _SIMPLE[path](call, order) if path in _SIMPLE else None


_REMEMBERING: Final[dict[str, Callable[[Call, Order, Seen], Answer]]] = {
    "/chat/completions": answer_chat,
    "/completions": answer_completion,
    "/messages": answer_message,
}
_SIMPLE: Final[dict[str, Callable[[Call, Order], Answer]]] = {
    "/messages/count_tokens": count_tokens,
    "/embeddings": answer_embeddings,
    "/audio/speech": answer_speech,
    "/audio/transcriptions": answer_transcription,
}


def _found(upstream: Upstream, call: Call, path: str) -> Answer | None:
    kind, _, rest = path.strip("/").partition("/")
    id, _, more = rest.partition("/")
    if kind == "models":
        return _models(rest)
    if kind == "responses" and id in upstream.responses and not more:
        return json_answer(upstream.responses[id], id=id)
    if kind == "videos" and not id:
        return list_videos(upstream.jobs)
    if kind == "videos" and id in upstream.jobs and more in ("", "content"):
        job = upstream.jobs[id]
        answer = send_video(job) if more else poll_video(job)
        _keep_job(upstream, id)
        return answer
    return None


def _keep_job(upstream: Upstream, id: str) -> None:
    if upstream.store is not None and id in upstream.jobs:
        upstream.store.put("videos", id, upstream.jobs[id])


def _models(id: str) -> Answer:
    rows = [
        {"id": name, "object": "model", "created": _SINCE, "owned_by": owner}
        for owner, names in MODELS.items()
        for name in names
    ]
    if not id:
        return json_answer({"object": "list", "data": rows})
    found = next((row for row in rows if row["id"] == id), None)
    if found is None:
        return refusal(404, f"The model '{id}' does not exist", "model", "model_not_found")
    return json_answer(found)


# --- refusals -------------------------------------------------------------------------------------

_OPENAI_SAYS: Final = {
    400: ("invalid_request_error", None, "The sandbox was told to find this request wrong."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "The sandbox was told to forbid this."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached."),
    500: ("server_error", None, "The server had an error while processing your request."),
    503: ("server_error", "overloaded", "The engine is currently overloaded, please try again later."),
}
_ANTHROPIC_SAYS: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 529: "overloaded_error",
}  # fmt: skip


def _refused(call: Call, path: str, order: Order, is_anthropic: bool) -> Answer | None:
    """A refusal that was ordered, or one that any provider would give."""
    headers = [] if order.retry_after is None else [("retry-after", str(order.retry_after))]
    if order.status is not None:
        return _worded(order.status, is_anthropic, headers)
    if not call.key and not path.startswith("/models"):
        return _worded(401, is_anthropic, headers)
    if path.startswith("/messages") and "anthropic-version" not in call.headers:
        return _worded(400, True, headers, "anthropic-version: header is required")
    return None


def _worded(status: int, is_anthropic: bool, headers: list[tuple[str, str]], message: str | None = None) -> Answer:
    kind, code, words = _OPENAI_SAYS.get(status, ("server_error", None, "The sandbox was told to refuse this."))
    if is_anthropic:
        error: dict[str, Any] = {"type": _ANTHROPIC_SAYS.get(status, "api_error"), "message": message or words}
        return json_answer({"type": "error", "error": error}, status=status, headers=headers)
    error = {"message": message or words, "type": kind, "param": None, "code": code}
    return json_answer({"error": error}, status=status, headers=headers)


# --- the driver -----------------------------------------------------------------------------------


def _drive(upstream: Upstream, call: Call) -> Answer:
    kind, _, name = call.path.removeprefix("/sandbox/").partition("/")
    if (call.method, kind) == ("GET", "log"):
        after = parse_qs(call.query).get("after", ["0"])[0]
        rows = upstream.diary.since(int(after) if after.isascii() and after.isdigit() else 0)
        return json_answer({"rows": rows, "last": rows[-1].n if rows else 0})
    if (call.method, kind) == ("DELETE", "log"):
        upstream.diary.rows.clear()
        return json_answer({})
    if (call.method, kind) == ("POST", "orders"):
        return _take_order(upstream, call)
    if (call.method, kind) == ("DELETE", "orders"):
        upstream.waiting.clear()
        return json_answer({})
    if (call.method, kind) == ("GET", "files") and name in upstream.files:
        content_type, data = upstream.files[name]
        return Answer([Piece(data)], content_type, length=len(data))
    return refusal(404, f"The driver has no {call.method} {call.path}")


def _take_order(upstream: Upstream, call: Call) -> Answer:
    try:
        waiting = msgspec.convert(call.fields, _Waiting)
        orders.read([waiting.order])
    except (msgspec.ValidationError, BadOrder) as problem:
        return refusal(400, str(problem))
    upstream.waiting.append(waiting)
    return json_answer({"waiting": len(upstream.waiting)})
