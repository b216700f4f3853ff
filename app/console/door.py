"""The guard of every page: who is signed in is asked first, by the database; and what a refusal looks like here."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any, Final

from htpy import a, p
from litestar import Request, Response, Router, get
from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath
from litestar.types import ControllerRouterHandler

from app.admin.tokens import ServiceTokens
from app.console.forms import Form, payer_of, read_form
from app.console.session import Customer, Operator, Role, Session, SignedOut, end_cookie, read_session
from app.console.shell import HEADERS, Frame, Page
from app.console.signed_out import refuse_signed_out
from app.kernel.db import Database
from app.kernel.errors import AppError, InvalidApiKey, InvalidCreditId, InvalidToken, MissingScope, NotFound
from app.kernel.logs import log, where_it_broke
from app.kernel.security import canonical_credit_id
from app.kernel.settings import Settings
from app.keys.verify import Verifier, refuse_ending

SIGN_IN: Final = {"customer": "/console/sign-in", "operator": "/operator/sign-in", "visitor": "/console/sign-in"}


@dataclass(slots=True)
class Here:
    """Who looks at this page, as the guard found it."""

    session: Session
    who: Customer | Operator | None = None
    is_new: bool = False
    cookies: list[Cookie] = field(default_factory=list)


def guarded(*handlers: ControllerRouterHandler) -> Router:
    """The pages behind their guard."""
    return Router(
        "/", route_handlers=list(handlers), include_in_schema=False, guards=[ask_who],
        dependencies={
            "customer": Provide(_who, sync_to_thread=False), "former": Provide(_former, sync_to_thread=False),
            "operator": Provide(_operator, sync_to_thread=False),
            "frame": Provide(_frame, sync_to_thread=False), "form": Provide(_form),
        },
        exception_handlers={
            SignedOut: _to_sign_in, AppError: _refused, HTTPException: _refused_by_litestar, Exception: _broken,
        },
    )  # fmt: skip


async def ask_who(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Prove the session of the role that the handler asks for; where it asks for none, a visitor's will do.

    Raises SignedOut, before anything else of the request is looked at.
    """
    names, (settings, db, verifier, services) = handler.parsed_fn_signature.parameters, _parts(connection)
    if names.keys() & {"customer", "former"}:
        session = _session(connection, settings, "customer")
        customer = await still_here(db, verifier, session, also_over="former" in names)
        connection.state.here = Here(session, customer)
    elif "operator" in names:
        session = _session(connection, settings, "operator")
        who, _ = await asyncio.gather(operator_of(services, session), refuse_signed_out(db, session))
        admin = replace(who.admin, request_id=connection.scope["state"].get("request_id"))
        connection.state.here = Here(session, replace(who, admin=admin))
    else:
        found = read_session(settings, connection.cookies, "visitor")
        connection.state.here = Here(found or Session.begun("visitor"), is_new=found is None)


async def still_here(db: Database, verifier: Verifier, session: Session, *, also_over: bool = False) -> Customer:
    """Who is signed in, as `customer_of`, with a session that nobody has signed out of. Raises SignedOut."""
    asked = customer_of(verifier, session, also_over=also_over)
    customer, _ = await asyncio.gather(asked, refuse_signed_out(db, session))
    return customer


async def customer_of(verifier: Verifier, session: Session, *, also_over: bool = False) -> Customer:
    """Who is signed in, if their credential still holds; or did, where the answer to a rotation may be asked for again.

    Raises SignedOut.
    """
    try:
        if canonical_credit_id(session.secret):
            return Customer(await verifier.credit_id(session.secret, also_over=also_over), session)
        return Customer(await verifier.api_key(session.secret), session)
    except (InvalidApiKey, InvalidCreditId):
        raise SignedOut("customer", had_one=True) from None


async def operator_of(services: ServiceTokens, session: Session) -> Operator:
    """Raises SignedOut."""
    try:
        return Operator(await services.admin(session.secret), session)
    except InvalidToken:
        raise SignedOut("operator", had_one=True) from None


def require_owner(customer: Customer) -> None:
    """For what an API key may not do, nor a credit id that was rotated. Raises MissingScope."""
    if not customer.is_owner:
        raise MissingScope("This needs the credit id: sign out, and in with it.")
    refuse_ending(customer.caller)


def require_key_manager(customer: Customer) -> None:
    """For what a key may do to those below it, where it was given the scope of that. Raises MissingScope."""
    if not customer.manages_keys:
        raise MissingScope("This needs the credit id, or a key that may make keys: sign out, and in with it.")
    refuse_ending(customer.caller)


def _session(connection: ASGIConnection[Any, Any, Any, Any], settings: Settings, role: Role) -> Session:
    found = read_session(settings, connection.cookies, role)
    if found is None:
        raise SignedOut(role)
    return found


def _parts(connection: ASGIConnection[Any, Any, Any, Any]) -> tuple[Settings, Database, Verifier, ServiceTokens]:
    state = connection.app.state
    return state.settings, state.db, state.verifier, state.services


def _who(request: Request[Any, Any, Any]) -> Any:
    return request.state.here.who


def _former(request: Request[Any, Any, Any]) -> Any:
    return request.state.here.who


def _operator(request: Request[Any, Any, Any]) -> Any:
    return request.state.here.who


def _frame(request: Request[Any, Any, Any]) -> Frame:
    here: Here = request.state.here
    settings: Settings = request.app.state.settings
    said = request.query_params.get("said", "")
    return Frame(settings, here.session, request.scope["path"].rstrip("/"), said, here.is_new, here.cookies)


async def _form(
    request: Request[Any, Any, Any], db: NamedDependency[Database], settings: NamedDependency[Settings]
) -> Form:
    here: Here = request.state.here
    match here.who:
        case Customer(caller):
            who = f"account/{caller.account_id}/{caller.kind}/{caller.key_id}"
            return await read_form(request, settings, db, here.session, who, f"account/{caller.account_id}")
        case Operator(admin):
            return await read_form(request, settings, db, here.session, f"admin/{admin.id}", f"admin/{admin.id}")
        case None:
            return await read_form(request, settings, db, here.session, here.session.nonce, payer_of(request))


# --- refusals as pages ------------------------------------------------------------------------------


def _to_sign_in(request: Request[Any, Any, Any], error: SignedOut) -> Page:
    """To the page that asks who you are, and back from there. SameSite=Strict keeps the cookie from us where another site's
    link led here: then the page asks for itself once more, which is ours to send it with."""
    settings: Settings = request.app.state.settings
    if request.method == "GET" and request.headers.get("sec-fetch-site") == "cross-site":
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return Response("", media_type="text/html", headers=HEADERS | {"Refresh": f"0; url={here}"})
    there = SIGN_IN[error.role] + ("?said=session-over" if error.had_one else "")
    cookies = [end_cookie(settings, error.role)] if error.had_one else []
    return Response("", status_code=303, media_type="text/html", headers=HEADERS | {"Location": there}, cookies=cookies)


def _refused(request: Request[Any, Any, Any], error: AppError) -> Page:
    request.state.error_code = error.code
    if error.status >= 500:
        log.warning("request.unavailable", code=error.code, where=where_it_broke(error))
    headers = {"Retry-After": str(error.retry_after_seconds)} if error.retry_after_seconds is not None else {}
    page = _frame_of(request).answer(
        _TITLES.get(error.status, "That was refused"),
        p(class_="problem", role="alert")[error.message],
        p[a(href=_back(request))["Back"]],
        status=error.status,
    )
    page.headers.update(headers)
    return page


def _refused_by_litestar(request: Request[Any, Any, Any], error: HTTPException) -> Page:
    if error.status_code >= 500:
        return _broken(request, error)
    found = (
        NotFound("There is no such page.") if error.status_code in (404, 405) else AppError("That could not be read.")
    )
    page = _refused(request, found)
    page.status_code = error.status_code
    return page


def _broken(request: Request[Any, Any, Any], error: Exception) -> Page:
    request.state.error_code = "internal_error"
    log.error("request.defect", exc_type=type(error).__name__, where=where_it_broke(error))
    return _refused(request, AppError("Something of ours broke; it is logged."))


def _frame_of(request: Request[Any, Any, Any]) -> Frame:
    """Also where a request was refused before it was asked whose it is."""
    here: Here = getattr(request.state, "here", None) or Here(Session.begun("visitor"))
    return Frame(request.app.state.settings, here.session, request.scope["path"], "", False, here.cookies)


def _back(request: Request[Any, Any, Any]) -> str:
    """A level up, which is a page that can be looked at."""
    path: str = request.scope["path"].rstrip("/")
    return path.rpartition("/")[0] or "/"


_TITLES: Final = {
    403: "That is not allowed", 404: "Not found", 409: "That was done already", 422: "That cannot be done so",
    429: "Too many at once", 500: "Something broke", 503: "Not now",
}  # fmt: skip


@get(["/console/{rest:path}", "/operator/{rest:path}"], sync_to_thread=False)
def catch_all(rest: FromPath[str]) -> Response[str]:
    """What no page has. Raises NotFound."""
    raise NotFound("There is no such page.")
