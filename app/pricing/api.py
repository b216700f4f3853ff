"""How anybody asks for the price catalogue: what is sold, and what a unit of it costs."""

from collections.abc import Iterator
from datetime import UTC, datetime
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Final

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, QueryParameter

from app.kernel.db import Database
from app.kernel.errors import NotFound
from app.kernel.money import JsonNumber, usd
from app.pricing.catalogue import Catalogues, NoActiveVersion
from app.pricing.kinds import MEDIA_KINDS, context_tokens, kind_of, kinds_asked
from app.pricing.quote import Catalogue, rounded_text
from app.pricing.rows import Dimension, parse_attributes

_UNITS = {
    Dimension.IMAGES: "image", Dimension.CHARACTERS: "character", Dimension.AUDIO_SECONDS: "second",
    Dimension.VIDEO_SECONDS: "second", Dimension.PIXELS: "pixel", Dimension.QUERIES: "query",
    Dimension.REQUESTS: "request",
}  # fmt: skip
_PLACES = 18
"""A price in atto-USD as a decimal in USD."""
_PER_MILLION: Final = {Dimension.INPUT: "input_per_1M_tokens", Dimension.OUTPUT: "output_per_1M_tokens"}
"""As PayPerQ tells them, beside the price of one."""
OfType = Annotated[str | None, QueryParameter(name="type")]


class PriceView(msgspec.Struct, frozen=True):
    """One price. `min_input_tokens` is the size of the whole call's input from which it applies."""

    model: str
    provider: str
    dimension: str
    unit: str
    price_usd: JsonNumber
    min_input_tokens: int
    attributes: dict[str, str]


class ModelView(msgspec.Struct, frozen=True):
    """A model that is sold. `pricing` is USD per unit of an ordinary call; `pricing_variants` are all other prices."""

    id: str
    name: str
    created: int
    created_at: int
    owned_by: str
    provider: str
    type: str
    mode: str
    pricing: dict[str, JsonNumber]
    pricing_variants: list[PriceView]
    context_length: int | None
    max_output_tokens: int | None
    default_attributes: dict[str, str]
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    """The OpenAI list shape."""

    data: list[ModelView]
    price_version: int | None
    object: str = "list"


class PriceList(msgspec.Struct, frozen=True):
    """Every price as a line of its own, and what features cost for one request."""

    data: list[PriceView]
    fees: dict[str, JsonNumber]
    price_version: int | None
    currency: str = "USD"
    object: str = "list"


@get("/v1/models", tags=["Prices"], summary="The models and their prices")
async def list_models(
    reads: NamedDependency[Database],
    read_catalogues: NamedDependency[Catalogues],
    model: FromQuery[str | None] = None,
    of_type: OfType = None,
) -> ModelList:
    """The chat models, or those of `type`: chat, image, video, audio or embedding, several with commas, or all. With
    `model` the one that it means, of whatever type."""
    return await _models(read_catalogues, reads, model, of_type)


@get("/models", tags=["Prices"], summary="The same as /v1/models")
async def list_models_unversioned(
    reads: NamedDependency[Database],
    read_catalogues: NamedDependency[Catalogues],
    model: FromQuery[str | None] = None,
    of_type: OfType = None,
) -> ModelList:
    """For clients whose base URL has no version in it."""
    return await _models(read_catalogues, reads, model, of_type)


@get("/router/models", tags=["Prices"], summary="The same as /v1/models")
async def list_router_models(
    reads: NamedDependency[Database],
    read_catalogues: NamedDependency[Catalogues],
    model: FromQuery[str | None] = None,
    of_type: OfType = None,
) -> ModelList:
    """For clients of routers, which look for the models here."""
    return await _models(read_catalogues, reads, model, of_type)


@get("/v1/media/models", tags=["Prices"], summary="The image, audio and video models and their prices")
async def list_media_models(
    reads: NamedDependency[Database],
    read_catalogues: NamedDependency[Catalogues],
    model: FromQuery[str | None] = None,
    of_type: OfType = None,
) -> ModelList:
    """The models that make or take pictures, sound and films; with `type`, as `/v1/models`."""
    return await _models(read_catalogues, reads, model, of_type or ",".join(MEDIA_KINDS))


@get("/v1/models/{model_id:path}", tags=["Prices"], summary="One model and its prices")
async def read_model(
    reads: NamedDependency[Database], read_catalogues: NamedDependency[Catalogues], model_id: FromPath[str]
) -> ModelView:
    """By the name that a call may have for it, slashes and all, as they are or percent-encoded."""
    return await model_named(read_catalogues, reads, model_id)


@get("/models/{model_id:path}", tags=["Prices"], summary="The same as /v1/models/{model_id}")
async def read_model_unversioned(
    reads: NamedDependency[Database], read_catalogues: NamedDependency[Catalogues], model_id: FromPath[str]
) -> ModelView:
    """For clients whose base URL has no version in it."""
    return await model_named(read_catalogues, reads, model_id)


@get("/v1/prices", tags=["Prices"], summary="Every price")
async def list_prices(
    reads: NamedDependency[Database], read_catalogues: NamedDependency[Catalogues], model: FromQuery[str | None] = None
) -> PriceList:
    """One line for each model, dimension, context tier and set of attributes."""
    catalogue = await _current(read_catalogues, reads)
    fees = {feature: usd(price_nusd) for feature, price_nusd in catalogue.fees(datetime.now(UTC)).items()}
    lines = [price for _, prices in _chosen(catalogue, model) for price in prices]
    return PriceList(lines, fees, catalogue.version_id or None)


async def _models(catalogues: Catalogues, db: Database, model: str | None, of_type: str | None) -> ModelList:
    catalogue = await _current(catalogues, db)
    kinds = kinds_asked(of_type or ("all" if model else "chat"))
    found = (view for view, _ in _chosen(catalogue, model))
    return ModelList([view for view in found if kinds is None or view.type in kinds], catalogue.version_id or None)


async def models_of(catalogues: Catalogues, db: Database, kinds: frozenset[str] | None) -> list[ModelView]:
    """All that are sold of these kinds, None for all kinds; for a door that tells them in other words."""
    found = _chosen(await _current(catalogues, db), None)
    return [view for view, _ in found if kinds is None or view.type in kinds]


async def model_named(catalogues: Catalogues, db: Database, name: str) -> ModelView:
    """Raises NotFound. A name from a path comes with the slash before it."""
    name = name.removeprefix("/")
    found = _chosen(await _current(catalogues, db), name)
    if not found:
        raise NotFound(f"No model is named {name[:200]!r} here; GET /v1/models?type=all lists them", param="model")
    return found[0][0]


async def _current(catalogues: Catalogues, db: Database) -> Catalogue:
    """The active catalogue; an empty one, version null, where nothing is sold yet."""
    try:
        return await catalogues.current(db)
    except NoActiveVersion:
        return _NOTHING


_NOTHING = Catalogue(0, ())
handlers = [
    list_models, list_models_unversioned, list_router_models, list_media_models, read_model, read_model_unversioned,
    list_prices,
]  # fmt: skip
_Listed = tuple[ModelView, tuple[PriceView, ...]]


def _chosen(catalogue: Catalogue, model: str | None) -> tuple[_Listed, ...]:
    """What is listed now, or was some seconds ago. An unknown model is an empty list, as a search that found nothing."""
    now = datetime.now(UTC)
    if model is None:
        return _everything(catalogue, now.replace(second=now.second // 10 * 10, microsecond=0))
    if not catalogue.is_known(model):
        return ()
    name, _ = catalogue.resolved(model)
    return tuple(_listed(catalogue, name, now))


@lru_cache(maxsize=2)
def _everything(catalogue: Catalogue, moment: datetime) -> tuple[_Listed, ...]:
    """Made every ten seconds at most, and for each new catalogue, because anybody may ask for it as often as they like."""
    now = max(moment, datetime.now(UTC))  # what has begun since holds already
    return tuple(found for model in catalogue.models() for found in _listed(catalogue, model, now))


def _listed(catalogue: Catalogue, model: str, now: datetime) -> Iterator[_Listed]:
    """One view for a model: of the provider that a call gets which names none, with the others' prices as lines."""
    providers = catalogue.providers_of(model)
    prices = tuple(price for provider in providers for price in _prices(catalogue, model, provider, now))
    if prices:
        yield _view(catalogue, model, providers[0], prices), prices


def _prices(catalogue: Catalogue, model: str, provider: str, now: datetime) -> Iterator[PriceView]:
    for dimension, tier_min, text, price_ausd in catalogue.listed(model, provider, now):
        unit = _UNITS.get(dimension, "token")
        attributes = parse_attributes(text)
        yield PriceView(
            model,
            provider,
            dimension.value,
            unit,
            msgspec.Raw(rounded_text(price_ausd / 10**18, _PLACES).encode()),
            tier_min,
            attributes,
        )


def _view(catalogue: Catalogue, model: str, provider: str, prices: tuple[PriceView, ...]) -> ModelView:
    about = catalogue.about(model, provider)
    standard = parse_attributes(about.default_attributes)
    ordinary = {
        price.dimension: price
        for price in sorted(prices, key=lambda price: len(price.attributes))
        if price.provider == provider and not price.min_input_tokens and price.attributes.items() <= standard.items()
    }
    kind = kind_of(about.mode, {price.dimension for price in prices})
    return ModelView(
        id=model,
        name=model,
        created=catalogue.created,
        created_at=catalogue.created * 1000,
        owned_by=provider,
        provider=provider,
        type=kind,
        mode=about.mode,
        pricing={dimension: price.price_usd for dimension, price in ordinary.items()} | _per_million(ordinary),
        pricing_variants=[price for price in prices if ordinary.get(price.dimension) is not price],
        context_length=context_tokens(catalogue, model, provider, kind),
        max_output_tokens=about.max_output_tokens,
        default_attributes=standard,
    )


def _per_million(ordinary: dict[str, PriceView]) -> dict[str, JsonNumber]:
    found = {name: ordinary[dimension] for dimension, name in _PER_MILLION.items() if dimension in ordinary}
    return {name: _times_a_million(price.price_usd) for name, price in found.items()}


def _times_a_million(price_usd: JsonNumber) -> JsonNumber:
    return msgspec.Raw(rounded_text(Fraction(bytes(price_usd).decode()) * 10**6, _PLACES).encode())
