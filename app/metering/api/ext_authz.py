"""How a gateway that knows no API of ours asks for metering: with a subrequest that a status and headers answer.

nginx, Caddy, Traefik, Envoy and APISIX send the client's headers and no body, so that nothing is known of what the
call may cost: a flat hold is made, and what the call did cost is told to /v1/meter/settle afterwards.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from litestar import Request, Response, Router, get, route
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.params import FromQuery

from app.kernel.db import new_id
from app.kernel.errors import AppError, InvalidApiKey, MalformedHeader
from app.kernel.money import usd_text
from app.kernel.security import Service
from app.kernel.settings import Settings
from app.keys.verify import KeyOwner, Shown, Verifier
from app.metering.holds import Ask, Held, Meter
from app.metering.priced import Pricer
from app.offers.mint import Mint
from app.offers.opening import Openings
from app.offers.proofs import Proofs, Use
from app.topups.create import Wish

PATH: Final = "/v1/meter/ext-authz"
GATEWAY_HEADER: Final = "x-service-token"
"""The gateway's own credential: `svc-…`, then `; id=…` and `; model=…` if it likes. Authorization is its client's."""

_UNWANTED: Final = "x-topup-offer"
_HOLD_SECONDS: Final = 900
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,58}", re.ASCII)
_MODEL: Final = re.compile(r"[!-:<-~]{1,200}", re.ASCII)
_ADDRESS: Final = re.compile(r"(?:https?://[^/?#]*)?(/[!-\"$->@-~]{0,199})", re.ASCII)
"""What is kept of an address: its path, without the query, which may hold secrets."""

Refuse = Callable[[Request[Any, Any, Any], AppError], Response[Any]]


@dataclass(frozen=True, slots=True)
class Told:
    """What the gateway itself says of the call. It stands beside the gateway's token, where no client can write."""

    request_id: str | None = None
    """The gateway's id for the call: the same one again gets the same hold."""
    model: str | None = None

    @classmethod
    def of(cls, header: str) -> "Told":
        """From `svc-…; id=…; model=…`. Raises MalformedHeader, without repeating what stood there."""
        found: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in header.split(";")[1:])):
            name, _, value = part.partition("=")
            pattern = {"id": _REQUEST_ID, "model": _MODEL}.get(name)
            if pattern is None or name in found or not pattern.fullmatch(value):
                raise MalformedHeader(
                    "After the token X-Service-Token takes '; id=' with 1-58 letters, digits or ._:- and '; model=' with 1-200"
                    " visible ASCII characters, each once",
                    param="X-Service-Token",
                )
            found[name] = value
        return cls(found.get("id"), found.get("model"))


def offer_wanted(request: Request[Any, Any, Any]) -> bool:
    """Whether a refusal for want of money may bear an offer: whoever says `X-Topup-Offer: none` wants none."""
    return request.headers.get(_UNWANTED, "").strip().lower() != "none"


@dataclass(frozen=True, slots=True)
class Payable:
    """What makes a refusal payable, for who knows no API of ours. `keyless` is what is offered to who shows no key at all."""

    mint: Mint
    proofs: Proofs
    openings: Openings
    keyless: Wish | None

    async def unknown(self, request: Request[Any, Any, Any]) -> AppError:
        """The refusal of who shows no key and no proof: 401, or 402 with the offer of an account."""
        if self.keyless is None or not offer_wanted(request):
            return InvalidApiKey("No API key: send it as 'Authorization: Bearer sk-…'")
        address = request.client.host if request.client else "unknown"
        whose = f"{request.headers.get('x-forwarded-for', '')} {request.headers.get('user-agent', '')}"
        return await self.openings.refused(address, whose, self.keyless)


_ALLOWED: Final = tuple(
    ResponseHeader(name=name, description=description, documentation_only=True)
    for name, description in (
        ("X-Account-Id", "Whose call it is."),
        ("X-Key-Id", "Which of the account's keys was shown."),
        ("X-Billing-Request-Id", "The `hold_id`: settle or release it."),
        (
            "X-Balance-Usd",
            "What the key may still spend after this hold, USD: the least of the account's balance and every limit.",
        ),
    )
)


@get(
    PATH,
    tags=["Metering"],
    summary="May this key make this call? For gateways that ask with a subrequest",
    media_type="text/plain",
    response_headers=_ALLOWED,
)
async def ask(
    request: Request[Any, Any, Any],
    gateway: NamedDependency[Service],
    verifier: NamedDependency[Verifier],
    meter: NamedDependency[Meter],
    pricer: NamedDependency[Pricer],
    settings: NamedDependency[Settings],
    payable: NamedDependency[Payable],
    mode: FromQuery[str | None] = None,
) -> Response[None]:
    """For nginx, Caddy, Traefik, Envoy and APISIX (configurations: `deploy/gateways`). Any method, and any path after this one.

    The client's key is in its own headers; the gateway's token is in `X-Service-Token`, in which `; id=…` makes a
    repeat harmless, and `; model=…` names the model. Holds a flat amount, `EXT_AUTHZ_HOLD_USD`.
    """
    return await _answer(request, gateway, verifier, meter, pricer, settings, payable)


@route(
    PATH, http_method=["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"], status_code=200, include_in_schema=False
)
async def ask_by_any_method(
    request: Request[Any, Any, Any],
    gateway: NamedDependency[Service],
    verifier: NamedDependency[Verifier],
    meter: NamedDependency[Meter],
    pricer: NamedDependency[Pricer],
    settings: NamedDependency[Settings],
    payable: NamedDependency[Payable],
) -> Response[None]:
    """The same: some gateways ask with their client's method."""
    return await _answer(request, gateway, verifier, meter, pricer, settings, payable)


@route(
    PATH + "/{path:path}",
    http_method=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"],
    status_code=200,
    include_in_schema=False,
)
async def ask_with_path(
    request: Request[Any, Any, Any],
    gateway: NamedDependency[Service],
    verifier: NamedDependency[Verifier],
    meter: NamedDependency[Meter],
    pricer: NamedDependency[Pricer],
    settings: NamedDependency[Settings],
    payable: NamedDependency[Payable],
) -> Response[None]:
    """The same, from Envoy, which asks with its client's path and query after ours; so the query tells nothing here."""
    return await _answer(request, gateway, verifier, meter, pricer, settings, payable)


def door(refuse: Refuse) -> Router:
    """The routes, whose refusals are `refuse`'s, in nginx's form where nginx asks."""

    def refusing(request: Request[Any, Any, Any], error: AppError) -> Response[Any]:
        answer = refuse(request, error)
        # Exactly so: another query, or one under a longer path, is one that some gateway passed on for its client.
        is_nginx = _path_after(request) == "" and request.scope["query_string"] == b"mode=nginx"
        return for_nginx(answer) if is_nginx else answer

    # The one with OPTIONS first: else Litestar answers OPTIONS itself, with a 204 that a gateway takes for a yes.
    handlers = [ask_by_any_method, ask, ask_with_path]
    return Router("/", route_handlers=handlers, exception_handlers={AppError: refusing})


def for_nginx(refusal: Response[Any]) -> Response[Any]:
    """A refusal that auth_request lets through: 403 instead of what it would turn into 500; the real one in headers.

    401 passes as it is. So does 5xx: that becomes a 500, which refuses too, and nobody takes it for a verdict.
    Source: ngx_http_auth_request_module.
    """
    body, status = msgspec.json.encode(refusal.content).decode(), refusal.status_code or 500
    if status == 402 and "WWW-Authenticate" in refusal.headers:
        refusal.headers["X-Authz-Challenge"] = refusal.headers.pop("WWW-Authenticate")
    refusal.headers["X-Authz-Status"] = str(status)
    refusal.headers["X-Authz-Body"] = re.sub(r"[^ -~]", lambda found: json.dumps(found[0])[1:-1], body)
    if status != 401 and status < 500:
        refusal.status_code = 403
    return refusal


async def _answer(
    request: Request[Any, Any, Any],
    gateway: Service,
    verifier: Verifier,
    meter: Meter,
    pricer: Pricer,
    settings: Settings,
    payable: Payable,
) -> Response[None]:
    told = Told.of(request.headers[GATEWAY_HEADER])
    shown = Shown.of(request.headers.multi_items())
    if shown.api_key is None and shown.proof is None:
        raise await payable.unknown(request)
    try:
        owner, use = await _payer(verifier, payable.proofs, shown)
        held = await _held(request, gateway, told, owner, use, meter, pricer, settings)
    except AppError as error:
        raise await payable.mint.cured(error, wanted=offer_wanted(request)) from error
    return Response(None, status_code=200, headers=_headers(held), media_type="text/plain")


async def _payer(verifier: Verifier, proofs: Proofs, shown: Shown) -> tuple[KeyOwner, Use | None]:
    """Whose call it is, and what of a proof of payment is to be consumed: see calls.py."""
    proven = None if shown.proof is None else await proofs.proven(shown.proof)
    if shown.api_key is None:
        assert proven is not None
        return proven.owner, proven.use
    owner = await verifier.owner_of(secret=shown.api_key)
    if owner is None:
        raise InvalidApiKey
    return owner, proven.use if proven is not None and owner == proven.owner else None


async def _held(
    request: Request[Any, Any, Any],
    gateway: Service,
    told: Told,
    owner: KeyOwner,
    use: Use | None,
    meter: Meter,
    pricer: Pricer,
    settings: Settings,
) -> Held:
    price_version, now = await pricer.moment()
    # Without an id of the gateway's every ask is a new one: under an id of the client's, one hold would do for many calls.
    return await meter.authorize(
        gateway.name,
        owner,
        Ask(
            request_id=f"authz:{told.request_id or new_id().hex}",
            amount_nusd=settings.ext_authz_hold_nusd,
            model=told.model,
            endpoint=_endpoint(request),
            ttl_seconds=_HOLD_SECONDS,
            price_version=price_version,
            made_at=now,
            model_names=await pricer.names(told.model),
            on_expiry=gateway.on_expiry,
        ),
        use,
    )


def _headers(held: Held) -> Mapping[str, str]:
    return {
        "X-Account-Id": str(held.account_id), "X-Key-Id": str(held.key_id), "X-Billing-Request-Id": held.hold_id,
        "X-Balance-Usd": usd_text(held.spendable_nusd),
    }  # fmt: skip


def _endpoint(request: Request[Any, Any, Any]) -> str | None:
    """The path that the client asked for; for the hold's record only, nothing is decided by it."""
    headers = request.headers
    address = headers.get("x-forwarded-uri") or headers.get("x-original-uri") or _path_after(request)
    found = _ADDRESS.match(address)
    return found[1] if found else None


def _path_after(request: Request[Any, Any, Any]) -> str:
    """What stands after our own path, as it came."""
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    return raw.decode("latin-1").partition(PATH)[2].partition("?")[0]
