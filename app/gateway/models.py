"""The models that can be had here, with their prices: row 14. They are Satmeter's, narrowed to what some upstream serves."""

from collections.abc import Callable
from typing import Any

import msgspec

from app.gateway.call import Gateway, unknown
from app.gateway.catalogue import CatalogueAway
from app.gateway.errors import InvalidField, Unpriced
from app.gateway.exchange import Exchange


async def models(gateway: Gateway, exchange: Exchange) -> None:
    """GET /v1/models, /models, /router/models, /v1/media/models."""
    path = exchange.path.removeprefix("/api")
    path = {"/v1/router/models": "/router/models", "/media/models": "/v1/media/models"}.get(path, path)
    found = await _listed(gateway, path, exchange.query)
    await exchange.answer(200, msgspec.json.encode(found))


async def model(gateway: Gateway, exchange: Exchange) -> None:
    """GET /v1/models/{id}."""
    name = exchange.path.partition("/models/")[2]
    found = await _listed(gateway, "/v1/models", {"model": name, "type": "all"})
    if not found["data"]:
        raise unknown(name)
    await exchange.answer(200, msgspec.json.encode(found["data"][0]))


async def refuse_incomplete(gateway: Gateway, model: str, check: Callable[[], None]) -> None:
    """Raises what `check` raises, but first of all, of a model that is not sold, that."""
    try:
        check()
    except InvalidField:
        if not await is_sold(gateway, model):
            raise unknown(model) from None
        raise


async def is_sold(gateway: Gateway, name: str) -> bool:
    """Whether a model has a price, also where nobody can tell just now."""
    try:
        return bool((await _listed(gateway, "/v1/models", {"model": name, "type": "all"}))["data"])
    except Unpriced:
        return True


async def _listed(gateway: Gateway, path: str, query: dict[str, str]) -> dict[str, Any]:
    """Raises Unpriced."""
    known = {str(name): query[name] for name in ("type", "model") if name in query}
    try:
        found = await gateway.catalogue.models(path, known)
    except CatalogueAway:
        raise Unpriced("The catalogue cannot be read just now", headers={"retry-after": "2"}) from None
    upstreams = gateway.settings.upstreams
    served = [row for row in msgspec.json.decode(found["data"], type=list[msgspec.Raw]) if upstreams.serve(_id(row))]
    return dict(found) | {"data": served}


def _id(row: msgspec.Raw) -> str:
    return msgspec.json.decode(row, type=_Row).id


class _Row(msgspec.Struct):
    id: str
