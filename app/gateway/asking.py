"""How an upstream is asked: which headers reach it and come back, and what is known when it does not answer."""

import asyncio
import re
from collections.abc import AsyncIterable, Mapping
from typing import Any, Final

import aiohttp
import msgspec

from app.gateway.errors import Refusal, UpstreamBusy, UpstreamFailed, UpstreamRefused
from app.gateway.upstreams import Target, Upstream

_SENT_ON: Final = ("accept", "anthropic-version", "anthropic-beta", "openai-beta")
"""All of a caller's headers that an upstream sees; none of them is about billing."""
_BROUGHT_BACK: Final = ("content-type", "content-disposition", "content-range", "accept-ranges", "openai-processing-ms")
"""All of an upstream's headers that a caller sees."""
_CONNECT_SECONDS: Final = 10
_KEPT_SECONDS: Final = 4
"""For how long an idle connection is used again: servers close theirs after 5 at the earliest."""
_READ_BYTES: Final = 64 * 1024
_REFUSALS_BYTES: Final = 64 * 1024
_SECRET: Final = re.compile(r"(?:sk|pk|key|svc|gsk|xai)[-_][\w*.…-]{6,}|https?://\S+", re.IGNORECASE)


class NotSent(Exception):
    """Nothing reached the upstream: it may be asked again, or another be."""


class Silent(Exception):
    """It was asked, and did not answer, or not to the end: it may have run."""


def new_session() -> aiohttp.ClientSession:
    """Connections to every upstream. No cookies, no proxies of the environment, nothing decompressed."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_SECONDS, ttl_dns_cache=60)
    return aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, read_bufsize=_READ_BYTES,
        trust_env=False, headers={"accept-encoding": "identity"},
    )  # fmt: skip


def request_headers(
    upstream: Upstream, path: str, caller: Mapping[str, str], content_type: str | None
) -> dict[str, str]:
    sent = {name: caller[name] for name in _SENT_ON if name in caller}
    if content_type is not None:
        sent["content-type"] = content_type
    if path.startswith("messages"):
        sent.setdefault("anthropic-version", "2023-06-01")
    if upstream.kind == "anthropic":
        if upstream.key:
            sent["x-api-key"] = upstream.key
    else:
        sent["authorization"] = (
            f"Bearer {upstream.key or 'none'}"  # servers of one's own ask for some key, and take any
        )
    return sent


def answer_headers(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: response.headers[name] for name in _BROUGHT_BACK if name in response.headers}


async def ask(
    session: aiohttp.ClientSession,
    target: Target,
    path: str,
    body: bytes | AsyncIterable[bytes] | None,
    caller: Mapping[str, str],
    *,
    content_type: str | None = "application/json",
    method: str = "POST",
) -> aiohttp.ClientResponse:
    """An upstream's answer, as soon as its head is there. Close it.

    Raises NotSent and Silent.
    """
    upstream = target.upstream
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=min(_CONNECT_SECONDS, upstream.timeout_seconds), sock_read=upstream.timeout_seconds
    )
    try:
        return await session.request(
            method, f"{upstream.base_url}/{path}", data=body, timeout=timeout, allow_redirects=False,
            headers=request_headers(upstream, path, caller, content_type if body is not None else None),
        )  # fmt: skip
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
        raise NotSent(type(error).__name__) from error
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, OSError) as error:
        raise Silent(type(error).__name__) from error


async def refusal_of(response: aiohttp.ClientResponse, upstream: Upstream) -> Refusal:
    """What an upstream's refusal is to our caller: their own mistake as it was said, and nothing of ours or the upstream's."""
    try:
        body = await response.content.read(_REFUSALS_BYTES)
    except (aiohttp.ClientError, TimeoutError, OSError):
        body = b""
    finally:
        response.close()
    status, said = response.status, _said(body)
    told = {"upstream_status": status}
    if status == 429 and said.get("code") not in ("insufficient_quota", "billing_hard_limit_reached"):
        seconds = response.headers.get("retry-after", "")
        wait = int(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) < 6 else 1
        return UpstreamBusy(metadata=told | {"retry_after": max(wait, 1)}, headers={"retry-after": str(max(wait, 1))})
    if status in (400, 404, 409, 413, 415, 422):
        refusal = UpstreamRefused(clean(str(said.get("message") or ""), upstream), metadata=told)
        refusal.status, param = status, said.get("param")
        refusal.param = clean(param, upstream)[:200] if isinstance(param, str) else None
        return refusal
    return failed(f"The model's provider answered {status}", status)


def failed(message: str = "", status: int | None = None) -> UpstreamFailed:
    return UpstreamFailed(message, metadata={"upstream_status": status})


def clean(text: str, upstream: Upstream) -> str:
    """An upstream's words without its key, its address, or anything that looks like one."""
    if upstream.key:
        text = text.replace(upstream.key, "…")
    host = upstream.base_url.split("//", 1)[1].split("/", 1)[0]
    return _SECRET.sub("…", text.replace(host, "…"))[:500]


def _said(body: bytes) -> dict[str, Any]:
    """The error object of an upstream's body, as OpenAI, Anthropic, vLLM and others write it."""
    try:
        read = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    inner = read.get("error", read) if isinstance(read, dict) else {}
    if isinstance(inner, str):
        return {"message": inner}
    return inner if isinstance(inner, dict) else {}
