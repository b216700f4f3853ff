"""Who is calling: each provider asks for one kind of credential, and refuses every other alike."""

from typing import Any

from litestar import Request
from litestar.di import NamedDependency

from app.admin.tokens import ServiceTokens, verify_admin
from app.kernel.db import Database
from app.kernel.errors import InvalidApiKey, InvalidCreditId, InvalidToken
from app.kernel.security import Admin, Caller, Service
from app.kernel.settings import Settings
from app.keys.verify import Verifier, authenticate, key_in
from app.metering.api.ext_authz import GATEWAY_HEADER


async def provide_caller(request: Request[Any, Any, Any], verifier: NamedDependency[Verifier]) -> Caller:
    """By credit id or API key."""
    return await authenticate(verifier, request.headers)


async def provide_owner(request: Request[Any, Any, Any], verifier: NamedDependency[Verifier]) -> Caller:
    """By credit id only: what an API key may not do."""
    if "x-credit-id" not in request.headers:
        raise InvalidCreditId("This needs the account's credit id, sent as 'x-credit-id'")
    return await verifier.credit_id(request.headers["x-credit-id"])


async def provide_key(request: Request[Any, Any, Any], verifier: NamedDependency[Verifier]) -> Caller:
    """By API key only: what is about the key itself."""
    secret = key_in(request.headers)
    if secret is None:
        raise InvalidApiKey("This is about the calling API key: send it as 'Authorization: Bearer sk-…'")
    return await verifier.api_key(secret)


def bearer(header: str) -> str:
    """The token in an Authorization header. Raises InvalidToken."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidToken
    return token.strip()


async def provide_service(request: Request[Any, Any, Any], services: NamedDependency[ServiceTokens]) -> Service:
    """By service token."""
    return await services.service(bearer(request.headers.get("authorization", "")))


async def provide_gateway(request: Request[Any, Any, Any], services: NamedDependency[ServiceTokens]) -> Service:
    """By service token in a header of its own: in Authorization a gateway passes on its client's key."""
    return await services.service(request.headers.get(GATEWAY_HEADER, "").partition(";")[0].strip())


async def provide_admin(
    request: Request[Any, Any, Any], db: NamedDependency[Database], settings: NamedDependency[Settings]
) -> Admin:
    """By admin token."""
    return await verify_admin(db, settings.pepper, bearer(request.headers.get("authorization", "")))
