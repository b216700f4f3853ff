"""Whose Idempotency-Key it is: who is proved to be calling, else their address. The same key of two callers is two keys."""

import hashlib
import re
from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler

from app.kernel.db import Database
from app.kernel.errors import MalformedHeader
from app.kernel.idempotency import Once
from app.kernel.ratelimit import blocks_of
from app.kernel.settings import Settings
from app.web.callers import Known, proves_itself

_VISIBLE = re.compile(r"[!#-~]{1,255}", re.ASCII)
"""Visible ASCII but the quote: a key is quoted as a whole or not at all."""


async def refuse_malformed_key(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard of the routes that take an Idempotency-Key. Raises MalformedHeader."""
    if "once" in handler.parsed_fn_signature.parameters:
        _idempotency_key(connection.headers.getall("idempotency-key", []))


async def provide_once(
    request: Request[Any, Any, Any], db: NamedDependency[Database], settings: NamedDependency[Settings]
) -> Once:
    """The idempotency of this POST. Asks nobody anything, so that nothing is cancelled when the request is refused."""
    known: Known | None = request.state.known
    address = request.client.host if request.client else "unknown"
    body = await request.body()
    name = known.name if known else f"address/{address}"
    if proves_itself(request.route_handler):  # who shows the same secret again is the same, wherever they are by then
        shown = hashlib.sha256(request.headers.get("authorization", "").encode() + b"\x00" + body)
        name = f"shown/{shown.hexdigest()}"
    once = Once(
        db,
        settings.pepper,
        settings.sealer,
        scope=f"{request.method} {request.url.path}\x00{name}",
        secret=known.secret if known else "",
        payer=known.payer if known else f"address/{blocks_of(address)[-1][0]}",
        key=_idempotency_key(request.headers.getall("idempotency-key", [])),
        request_hash=hashlib.sha256(body).digest(),
    )
    request.state.once = once
    return once


def _idempotency_key(lines: list[str]) -> str | None:
    keys = {line[1:-1] if len(line) >= 2 and line[0] == line[-1] == '"' else line for line in lines}
    if not keys:
        return None
    key = keys.pop()
    if keys:
        raise MalformedHeader("Idempotency-Key was sent twice, and not the same; send one", param="Idempotency-Key")
    if not _VISIBLE.fullmatch(key):
        raise MalformedHeader(
            f"Idempotency-Key must be 1-255 visible ASCII characters without quotes inside, got {len(key)} characters",
            param="Idempotency-Key",
        )
    return key
