"""Whose Idempotency-Key it is: the same key of two callers is two keys."""

import hashlib
import re
from typing import Any

from litestar import Request
from litestar.di import NamedDependency

from app.kernel.db import Database
from app.kernel.errors import MalformedHeader
from app.kernel.idempotency import Once
from app.kernel.settings import Settings

_VISIBLE = re.compile(r"[!#-~]{1,255}", re.ASCII)
"""Visible ASCII but the quote: a key is quoted as a whole or not at all."""


async def provide_once(
    request: Request[Any, Any, Any], db: NamedDependency[Database], settings: NamedDependency[Settings]
) -> Once:
    """The idempotency of this POST, scoped to whoever sends it: the same key of two callers is two keys."""
    headers = request.headers
    secrets = (headers.get(name, "") for name in ("authorization", "x-api-key", "api-key"))
    who = "\x00".join((headers.get("x-credit-id", "").lower(), *secrets))
    if not who.strip("\x00"):
        who = request.client.host if request.client else "unknown"
    body = await request.body()
    once = Once(
        db,
        settings.pepper,
        settings.sealer,
        scope=f"{request.method} {request.url.path}\x00{who}",
        key=_idempotency_key(headers.get("idempotency-key")),
        request_hash=hashlib.sha256(body).digest(),
    )
    request.state.once = once
    return once


def _idempotency_key(header: str | None) -> str | None:
    if header is None:
        return None
    key = header[1:-1] if len(header) >= 2 and header[0] == header[-1] == '"' else header
    if not _VISIBLE.fullmatch(key):
        raise MalformedHeader(
            f"Idempotency-Key must be 1-255 visible ASCII characters without quotes inside, got {len(key)} characters",
            param="Idempotency-Key",
        )
    return key
