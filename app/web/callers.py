"""Who is calling: asked alone, and before anything else of a request is looked at."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from app.admin.scopes import require_scope_of
from app.admin.tokens import ServiceTokens
from app.kernel.errors import InvalidApiKey, InvalidCreditId, InvalidToken
from app.kernel.security import Admin, Caller, Kind, Service, canonical_credit_id
from app.keys.verify import MANAGES_KEYS, Shown, Verifier, authenticate, key_of, refuse_ending, require_scope, the_only
from app.metering.api.ext_authz import GATEWAY_HEADER
from app.web.refusals import OPENROUTER

_READS: Final = ("GET", "HEAD")
Lines = Sequence[tuple[str, str]]
"""Header lines as they came, names in lower case."""


@dataclass(frozen=True, slots=True)
class Known:
    """Who was proved to be calling, and the secret that proved it."""

    who: Caller | Service | Admin
    secret: str = field(repr=False)

    @property
    def name(self) -> str:
        """The same for whatever way the credential was sent in; no secret."""
        match self.who:
            case Caller(kind, account_id, key_id):
                return f"account/{account_id}/{kind}/{key_id}"
            case Service(name=name):  # several tokens may be one service
                return f"service/{name}"
            case Admin(id=token_id):
                return f"admin/{token_id}"

    @property
    def payer(self) -> str:
        """Whom a share of something is counted for: the account, whichever of its credentials was sent."""
        return f"account/{self.who.account_id}" if isinstance(self.who, Caller) else self.name


Ask = Callable[[Lines], Awaitable[Known | None]]
_NEEDS_MANAGER: Final = "This needs the account's credit id, sent as 'x-credit-id', or an API key with the scope 'keys' for the keys below it"


class Callers:
    """Knows by the name of a handler's dependency which credential it needs; `ask` is the guard of every route."""

    names: Final = ("caller", "owner", "rotating", "manager", "key", "service", "gateway", "admin", "anybody")
    """What a handler may ask for, to be given who was found."""

    def __init__(self, verifier: Verifier, services: ServiceTokens) -> None:
        self._verifier, self._services = verifier, services
        self._asks: dict[str, Ask] = {
            "caller": self._caller, "owner": self._owner, "rotating": self._rotating, "manager": self._manager, "key": self._key,
            "service": self._service,
            "gateway": self._gateway, "admin": self._admin, "anybody": self._anybody, "once": self._whoever,
        }  # fmt: skip

    async def ask(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Before the body is read, a parameter looked at or another dependency asked, so that a stranger learns nothing of
        them, and so that no refusal of those cancels what the database was asked here.

        Raises InvalidCreditId, InvalidApiKey, InvalidToken, MissingScope for an admin token that was narrowed to other things,
        and MalformedHeader for two credentials that differ.
        """
        needs = handler.parsed_fn_signature.parameters
        ask = next((self._asks[name] for name in self._asks if name in needs and not proves_itself(handler)), None)
        lines: Lines = list(connection.headers.multi_items())
        if connection.scope["path"].startswith(OPENROUTER):
            lines = with_management_key(lines)
        known = None if ask is None else await ask(lines)
        scope: Any = connection.scope
        if (
            known is not None
            and isinstance(known.who, Caller)
            and {"owner", "manager"} & needs.keys()
            and scope["method"] not in _READS
        ):
            refuse_ending(known.who)
        if known is not None and isinstance(known.who, Admin):
            admin = replace(known.who, request_id=scope["state"].get("request_id"))
            known = replace(known, who=admin)
            if "admin" in needs:
                require_scope_of(admin, scope["method"], scope["path_template"])
        connection.state.known = known

    async def _caller(self, lines: Lines) -> Known:
        """By credit id or API key."""
        shown = Shown.of(lines)
        return _known(await authenticate(self._verifier, shown), shown.credit_id or shown.api_key or shown.proof or "")

    async def _owner(self, lines: Lines) -> Known:
        """By credit id only: what an API key may not do."""
        if Shown.of(lines).credit_id is None:
            raise InvalidCreditId("This needs the account's credit id, sent as 'x-credit-id'")
        return await self._caller(lines)

    async def _rotating(self, lines: Lines) -> Known:
        """By credit id, also by one that was rotated, where the answer to that may be asked for again."""
        shown = Shown.of(lines)
        if shown.credit_id is None or not any(name == "idempotency-key" for name, _ in lines):
            return await self._owner(lines)
        return Known(await self._verifier.credit_id(shown.credit_id, also_over=True), shown.credit_id)

    async def _manager(self, lines: Lines) -> Known:
        """By credit id, or by an API key that was given the scope of managing the keys below it.

        Raises MissingScope for a key that was given others, and InvalidCreditId for one that was given none.
        """
        shown = Shown.of(lines)
        if shown.credit_id is not None:
            return await self._caller(lines)
        if shown.api_key is None or not self._verifier.is_key(shown.api_key):
            raise InvalidCreditId(_NEEDS_MANAGER)
        caller = await self._verifier.api_key(shown.api_key)
        if caller.scopes is None:
            raise InvalidCreditId(_NEEDS_MANAGER)
        require_scope(caller, MANAGES_KEYS)
        return _known(caller, shown.api_key)

    async def _key(self, lines: Lines) -> Known:
        """By API key only: what is about the key itself."""
        shown = Shown.of(lines)
        if shown.api_key is None and shown.proof is None:
            raise InvalidApiKey("This is about the calling API key: send it as 'Authorization: Bearer sk-…'")
        owner = None if shown.credit_id is None else await self._verifier.credit_id(shown.credit_id)
        return _known(await key_of(self._verifier, shown, owner), shown.api_key or shown.proof or "")

    async def _service(self, lines: Lines) -> Known:
        """By service token."""
        token = _token(lines)
        return Known(await self._services.service(token), token)

    async def _gateway(self, lines: Lines) -> Known:
        """By service token in a header of its own: in Authorization a gateway passes on its client's key."""
        told = the_only((value for name, value in lines if name == GATEWAY_HEADER), "service tokens", "X-Service-Token")
        token = (told or "").partition(";")[0].strip()
        return Known(await self._services.service(token), token)

    async def _admin(self, lines: Lines) -> Known:
        """By admin token."""
        token = _token(lines)
        return Known(await self._services.admin(token), token)

    async def _anybody(self, lines: Lines) -> Known | None:
        """By credit id or API key, if one was sent in a header: it may also be in the body."""
        return await self._caller(lines) if Shown.of(lines) != Shown() else None

    async def _whoever(self, lines: Lines) -> Known | None:
        """By any credential, where none is needed: one that was sent and proves nothing is refused here too."""
        shown = Shown.of(lines)
        kind = (shown.api_key or "")[:4]
        if kind in ("svc-", "adm-"):
            known = await (self._service if kind == "svc-" else self._admin)(lines)
            if shown.credit_id is not None:
                await self._verifier.credit_id(shown.credit_id)
            return known
        if shown.proof is not None and shown == Shown(proof=shown.proof):
            return None  # of a payment for what is only about to be made: its maker reads it
        if shown != Shown():
            return await self._caller(lines)
        if any(name == "authorization" and value.strip() for name, value in lines):
            raise InvalidApiKey
        return None


def _known(caller: Caller, secret: str) -> Known:
    """Whoever shows a JWT shows another one tomorrow, and is answered as the same."""
    is_token = caller.kind is Kind.API_KEY and caller.lookup is not None
    return Known(caller, caller.lookup.hex() if is_token and caller.lookup is not None else secret)


def proves_itself(handler: BaseRouteHandler) -> bool:
    """Whether a route is asked by whoever has lost their credential, and proves in another way who they are."""
    return bool(handler.opt.get("proves_itself"))


def with_management_key(lines: Lines) -> Lines:
    """A credit id that was sent as OpenRouter's clients send their management key, in the header that it has here."""
    return [
        ("x-credit-id", token.strip())
        if name == "authorization"
        and (token := value.partition(" ")[2])
        and canonical_credit_id(token.strip()) is not None
        else (name, value)
        for name, value in lines
    ]


def bearer(header: str) -> str:
    """The token in an Authorization header. Raises InvalidToken."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidToken
    return token.strip()


def shown_service(find: Callable[[str], Awaitable[Service]]) -> Callable[[str], Awaitable[Service]]:
    """From an Authorization header to the service that its token is of, as `find` knows it."""

    async def found(header: str) -> Service:
        return await find(bearer(header))

    return found


def _token(lines: Lines) -> str:
    """Raises InvalidToken where there is none, and MalformedHeader where there are two."""
    shown = [value for name, value in lines if name == "authorization" and value[:6].lower() == "bearer"]
    token = the_only(map(bearer, shown), "tokens", "Authorization")
    if token is None:
        raise InvalidToken
    return token


def giving_who_called() -> Callable[[Request[Any, Any, Any]], Any]:
    """A provider of whom `Callers.ask` found; one for each name, because Litestar takes none twice."""

    def give(request: Request[Any, Any, Any]) -> Any:
        return request.state.known.who if request.state.known else None

    return give
