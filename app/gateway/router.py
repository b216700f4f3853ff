"""The router: which model answers a prompt, decided by published figures and prices, and explained: rows 16 and 17."""

from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from app.gateway.answering import Wire
from app.gateway.call import Gateway, unknown
from app.gateway.catalogue import CatalogueAway
from app.gateway.chat import LIMITS, last_words, wants_usage, with_search
from app.gateway.count import most_tokens
from app.gateway.errors import InvalidField, UnknownModel, Unpriced
from app.gateway.exchange import Body, Exchange
from app.gateway.inference import flag_of, infer, limit_of, texts_of
from app.gateway.profiles import JUDGED_BY, PROFILED, Cluster, cluster_of, expected_error, why

_OURS: Final = ("models", "cost_weight", "execute")
_ANSWER_TOKENS: Final = 500
"""Of an answer whose length is not said: for comparing what models cost, and nothing else."""


class _Priced(msgspec.Struct):
    id: str
    type: str
    pricing: dict[str, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """A model that may answer: how often it is wrong, None where that was never published, and what it costs here."""

    model: str
    error: float | None
    cost: float
    score: float


async def router(gateway: Gateway, exchange: Exchange) -> None:
    """POST /v1/router: the decision is free, the call that follows is charged as any."""
    body = await exchange.json()
    executes = flag_of(body, "execute") if "execute" in body else True
    cluster = cluster_of(last_words(body))
    choice = _chosen(await _choices(gateway, body, cluster), cluster)
    routing = _routing(gateway, choice, cluster)
    if not executes:
        await exchange.answer(200, msgspec.json.encode(routing))
        return
    asked: Body = {name: raw for name, raw in body.items() if name not in _OURS}
    asked["model"] = msgspec.Raw(msgspec.json.encode(choice.model))
    told = b'"routing":' + msgspec.json.encode(routing)
    ask = replace(await with_search(gateway, asked), beside=lambda: told)
    await infer(gateway, exchange, ask, Wire.OPENAI, shows_usage=wants_usage(asked))


async def profiles(gateway: Gateway, exchange: Exchange) -> None:
    """GET /v1/router/profiles: the models of which figures were published and that are served here."""
    found = [model for model in PROFILED if gateway.settings.upstreams.targets(model, "chat")]
    await exchange.answer(200, msgspec.json.encode({"profiles": found, "count": len(found)}))


async def _choices(gateway: Gateway, body: Body, cluster: Cluster) -> list[Choice]:
    """Raises InvalidField, UnknownModel, Unpriced."""
    named, weight = texts_of(body, "models"), _weight(body)
    if "models" in body and len(named) < 2:
        raise InvalidField("models names two models at least, to choose from", param="models")
    upstreams = gateway.settings.upstreams
    for model in named:
        if not upstreams.targets(model, "chat"):
            raise unknown(model)
    prices = await _prices(gateway)
    entered, answered = most_tokens(bytes(body["messages"])), limit_of(body, LIMITS) or _ANSWER_TOKENS
    costs = {
        model: prices[bare].get("input", 0.0) * entered + prices[bare].get("output", 0.0) * answered
        for model in (named or PROFILED)
        if (bare := model.rpartition("/")[2]) in prices and upstreams.targets(model, "chat")
    }
    most = max(costs.values(), default=0.0) or 1.0
    found = [(model, expected_error(model, cluster), cost / most) for model, cost in costs.items()]
    return [Choice(model, error, cost, (error or 0.0) + weight * cost) for model, error, cost in found]


def _chosen(choices: list[Choice], cluster: Cluster) -> Choice:
    """The lowest score among those with a figure; where none has one, the cheapest. Raises UnknownModel."""
    if not choices:
        raise UnknownModel("None of these models is sold here", param="models")
    judged = [choice for choice in choices if choice.error is not None]
    return min(judged, key=lambda choice: (choice.score, choice.cost)) if judged else min(choices, key=lambda choice: choice.cost)  # fmt: skip


def _routing(gateway: Gateway, choice: Choice, cluster: Cluster) -> dict[str, Any]:
    upstream = gateway.settings.upstreams.targets(choice.model, "chat")[0].upstream
    benchmark = JUDGED_BY[cluster][0]
    begin = f"{cluster.name.replace('_', ' ').lower()}: {why(cluster)}"
    told: dict[str, Any] = {
        "selected_model": choice.model,
        "selected_provider": upstream.name,
        "cluster_id": int(cluster),
    }
    if choice.error is None:
        return told | {
            "reasoning": f"{begin}; nothing published compares these models, so the cheapest",
            "confidence": None,
        }
    reasoning = f"{begin}; the lowest of error in {benchmark} ({choice.error:g}) and weighted cost"
    return told | {
        "reasoning": reasoning, "confidence": round(1 - choice.error, 3), "expected_error": choice.error,
        "cost_adjusted_score": round(choice.score, 6),
    }  # fmt: skip


async def _prices(gateway: Gateway) -> dict[str, dict[str, float]]:
    """Of the chat models that are sold. Raises Unpriced."""
    try:
        listed = (await gateway.catalogue.models("/v1/models", {}))["data"]
    except CatalogueAway:
        raise Unpriced("The catalogue cannot be read just now", headers={"retry-after": "2"}) from None
    rows = msgspec.json.decode(listed, type=list[_Priced])
    return {row.id: row.pricing for row in rows if row.type == "chat"}


def _weight(body: Body) -> float:
    """Raises InvalidField."""
    try:
        weight = msgspec.json.decode(body.get("cost_weight", b"0"), type=float | None) or 0.0
    except msgspec.DecodeError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise InvalidField("cost_weight is a number from 0 to 1", param="cost_weight")
    return weight
