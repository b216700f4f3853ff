"""Who serves a model, the primary first: row 15."""

from typing import Any, Final

import msgspec

from app.gateway.call import Gateway, unknown
from app.gateway.exchange import Exchange
from app.gateway.models import is_sold

_DEFAULT: Final = "gpt-4o-mini"


async def providers(gateway: Gateway, exchange: Exchange) -> None:
    """GET /v1/providers: an array, or with `envelope=true` what older clients read."""
    model = exchange.query.get("model") or _DEFAULT
    found = gateway.settings.upstreams.providers_of(model)
    if not found or not await is_sold(gateway, model):  # an upstream may take every name
        raise unknown(model)
    rows: list[dict[str, Any]] = [
        {"id": each.name, "type": "backup" if number else "primary", "enabled": True, "params": {}}
        for number, each in enumerate(found)
    ]
    wants_envelope = exchange.query.get("envelope") == "true"
    await exchange.answer(200, msgspec.json.encode({"providers": rows} if wants_envelope else rows))
