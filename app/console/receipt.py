"""The receipt, which is the checkout too: one page that can be paid at while it is open, and adds up when it was.

Its address is its key. What changes comes by server-sent events; without scripts the page asks again by itself.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from htpy import a, p
from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.response import Stream

from app.console.payment import changes, payment_page, qr_svg, title
from app.console.shell import HEADERS, Frame, Page
from app.kernel.db import Database
from app.kernel.errors import InvoiceNotFound
from app.kernel.settings import Settings
from app.topups.receipt import Receipt, opened_token, read_receipt


@get("/receipts/{token:str}")
async def receipt(
    frame: NamedDependency[Frame], db: NamedDependency[Database], settings: NamedDependency[Settings], token: FromPath[str]
) -> Page:  # fmt: skip
    """To pay, to look at and to print."""
    found = await _reading(db, settings, token)()
    # Nobody is signed in here: the page has no form, and so needs no session.
    return replace(frame, is_new=False).answer(
        title(found),
        *payment_page(settings, found, f"/receipts/{token}"),
        p(class_="noprint acts")[a(href="/console")["Your account"], a(href="/docs#guide-topup")["How top-ups work"]],
        refresh=10 if found.is_watched else 0,
    )


@get("/receipts/{token:str}/qr.svg", media_type="image/svg+xml")
async def picture(
    db: NamedDependency[Database], settings: NamedDependency[Settings], token: FromPath[str]
) -> Response[bytes]:
    """The QR code, while there is something to pay."""
    return qr_answer(await _reading(db, settings, token)())


def qr_answer(found: Receipt) -> Response[bytes]:
    """Raises InvoiceNotFound."""
    if not found.is_open:
        raise InvoiceNotFound("There is nothing to pay any more.")
    return Response(qr_svg(found), media_type="image/svg+xml", headers=dict(HEADERS))


@get("/receipts/{token:str}/live", media_type="text/event-stream")
async def live(
    request: Request[Any, Any, Any], db: NamedDependency[Database], settings: NamedDependency[Settings],
    departure: NamedDependency[Any], token: FromPath[str],
) -> Stream:  # fmt: skip
    """See `changes`."""
    read = _reading(db, settings, token)
    await read()
    told = changes(read, settings, departure, f"/receipts/{token}", seen_by(request))
    return Stream(told, media_type="text/event-stream", headers=dict(HEADERS))


def seen_by(request: Request[Any, Any, Any]) -> str:
    """What the page has drawn already: a browser that comes back to its stream says it in a header."""
    return request.headers.get("last-event-id") or request.query_params.get("seen") or ""


def _reading(db: Database, settings: Settings, token: str) -> Callable[[], Awaitable[Receipt]]:
    """Raises InvoiceNotFound, now or then."""
    account_id, topup_id = opened_token(settings.pepper, token)
    return lambda: db.transaction(lambda session: read_receipt(session, account_id, topup_id))


handlers = (receipt, picture, live)
