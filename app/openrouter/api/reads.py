"""The account's credits, the calling key, and the calls, as OpenRouter tells them."""

import uuid
from datetime import UTC, date, datetime
from typing import Any, Final, Literal

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromQuery

from app.activity.calendar import DAY, moment_of
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField
from app.kernel.money import JsonNumber, usd
from app.kernel.security import Caller, Pepper
from app.kernel.settings import Settings
from app.keys.issue import key_of_hash, read
from app.keys.verify import MANAGES_KEYS, require_scope
from app.ledger.charge import ChargeId
from app.openrouter.api.words import KeyWords, key_words, read_day, read_hash
from app.openrouter.calls import DAYS_TOLD, activity, generation
from app.openrouter.spending import Credits, read_credits, read_spent
from app.topups.admission import has_paid

_NOBODY: Final = uuid.UUID(int=0)
"""No key's id: whose calls are shown for a hash that no key of the account has."""
_ENDPOINTS: Final = uuid.UUID("5e0d2a5e-7c0f-4c57-9d6a-3a8a2b7a9f10")
"""The namespace of endpoint ids: a model at a provider has the same one every day."""


class CreditsView(msgspec.Struct, frozen=True):
    """USD. What is left is the difference."""

    total_credits: JsonNumber
    total_usage: JsonNumber


class CreditsAnswer(msgspec.Struct, frozen=True):
    data: CreditsView

    @classmethod
    def of(cls, found: Credits) -> "CreditsAnswer":
        return cls(CreditsView(usd(found.total_nusd), usd(found.used_nusd)))


class OldRateLimit(msgspec.Struct, frozen=True):
    """Deprecated by OpenRouter, and read by its older clients."""

    requests: int = -1
    interval: str = "10s"
    note: str = "This field is deprecated and safe to ignore."


class CurrentKeyView(KeyWords, frozen=True, kw_only=True):
    """The calling key in OpenRouter's words, USD."""

    is_free_tier: bool
    is_management_key: bool = False
    is_provisioning_key: bool = False
    rate_limit: OldRateLimit = OldRateLimit()


class CurrentKeyAnswer(msgspec.Struct, frozen=True):
    data: CurrentKeyView


class DailyView(msgspec.Struct, frozen=True):
    """The calls of a UTC day, model and provider; `usage` is USD, less what was refunded."""

    date: date
    model: str
    model_permaslug: str
    endpoint_id: uuid.UUID
    provider_name: str
    usage: JsonNumber
    byok_usage_inference: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int

    @classmethod
    def of(cls, line: Row) -> "DailyView":
        return cls(
            date=line["day"],
            model=line["model"],
            model_permaslug=line["served_model"],
            endpoint_id=uuid.uuid5(_ENDPOINTS, f"{line['provider']}/{line['served_model']}"),
            provider_name=line["provider"],
            usage=usd(line["cost_nusd"] - line["refunded_nusd"]),
            byok_usage_inference=0,
            requests=line["requests"],
            prompt_tokens=line["input_tokens"],
            completion_tokens=line["output_tokens"],
            reasoning_tokens=line["reasoning_tokens"],
        )


class DailyAnswer(msgspec.Struct, frozen=True):
    data: list[DailyView]


class GenerationView(msgspec.Struct, frozen=True, kw_only=True):
    """One call in OpenRouter's words, USD less what was refunded. Null is what is not known here."""

    id: str
    charge_id: str
    upstream_id: str | None
    request_id: str
    model: str
    provider_name: str | None
    created_at: datetime
    total_cost: JsonNumber
    usage: JsonNumber
    tokens_prompt: int
    tokens_completion: int
    native_tokens_prompt: int
    native_tokens_completion: int
    native_tokens_reasoning: int
    native_tokens_cached: int
    native_tokens_completion_images: int
    num_media_completion: int
    cancelled: bool
    latency: int | None
    generation_time: int | None
    is_byok: bool = False
    origin: str = ""
    cache_discount: None = None
    upstream_inference_cost: None = None
    app_id: None = None
    streamed: None = None
    moderation_latency: None = None
    finish_reason: None = None
    native_finish_reason: None = None
    service_tier: None = None
    num_media_prompt: None = None
    num_input_audio_prompt: None = None
    num_search_results: None = None
    num_fetches: None = None
    web_search_engine: None = None
    external_user: None = None
    api_type: None = None
    preset_id: None = None
    router: None = None
    provider_responses: None = None
    user_agent: None = None
    http_referer: None = None
    workspace_id: uuid.UUID
    data_region: Literal["global"] = "global"

    @classmethod
    def of(cls, asked: str, call: Row) -> "GenerationView":
        units = call["units"] or {}
        used = {name: units.get(name) or 0 for name in _UNITS}
        return cls(
            id=asked,
            charge_id=str(ChargeId(call["account_id"], call["id"])),
            upstream_id=call["upstream_id"],
            request_id=call["request_id"],
            model=call["model"],
            provider_name=call["provider"],
            created_at=moment_of(call["id"]),
            total_cost=usd(call["cost_nusd"]),
            usage=usd(call["cost_nusd"]),
            tokens_prompt=used["input_tokens"],
            tokens_completion=used["output_tokens"],
            native_tokens_prompt=used["input_tokens"],
            native_tokens_completion=used["output_tokens"],
            native_tokens_reasoning=used["reasoning_tokens"],
            native_tokens_cached=used["cache_read_tokens"],
            native_tokens_completion_images=used["image_output_tokens"],
            num_media_completion=used["images"],
            cancelled=call["outcome"] == "client_disconnected",
            latency=call["latency_ms"],
            generation_time=_generation_ms(call),
            workspace_id=call["account_id"],
        )


_UNITS: Final = (
    "input_tokens",
    "output_tokens",
    "reasoning_tokens",
    "cache_read_tokens",
    "image_output_tokens",
    "images",
)


class GenerationAnswer(msgspec.Struct, frozen=True):
    data: GenerationView


@get("/api/v1/credits", tags=["OpenRouter"], summary="Credits, as OpenRouter tells them")
async def read_total_credits(caller: NamedDependency[Caller], db: NamedDependency[Database]) -> CreditsAnswer:
    """What was ever credited, and what was used of it. For dashboards made for OpenRouter."""
    require_scope(caller, "balance")
    return CreditsAnswer.of(await db.transaction(lambda session: read_credits(session, caller.account_id)))


@get(["/api/v1/key", "/api/v1/auth/key"], tags=["OpenRouter"], summary="The calling key, as OpenRouter tells it")
async def read_current_key(key: NamedDependency[Caller], db: NamedDependency[Database]) -> CurrentKeyAnswer:
    """Its limit, what it and those below it spent in this UTC day, week (from Monday) and month, and the least that is left by any
    limit of it and of the keys above it. For dashboards made for OpenRouter."""
    require_scope(key, "balance")
    assert key.key_id is not None
    key_id, today = key.key_id, datetime.now(UTC).date()

    async def work(session: Any) -> CurrentKeyView:
        found, spent = (
            await read(session, key.account_id, key_id),
            await read_spent(session, key.account_id, today, key_id),
        )
        manages = key.scopes is not None and MANAGES_KEYS in key.scopes
        return CurrentKeyView(
            **key_words(found, spent[key_id]), is_free_tier=not await has_paid(session, key.account_id),
            is_management_key=manages, is_provisioning_key=manages,
        )  # fmt: skip

    return CurrentKeyAnswer(await db.transaction(work))


@get("/api/v1/activity", tags=["OpenRouter"], summary="Calls per day, as OpenRouter tells them")
async def list_daily_activity(
    caller: NamedDependency[Caller],
    reads: NamedDependency[Database],
    settings: NamedDependency[Settings],
    date: FromQuery[str | None] = None,
    date_from: FromQuery[str | None] = None,
    date_to: FromQuery[str | None] = None,
    api_key_hash: FromQuery[str | None] = None,
) -> DailyAnswer:
    """Per UTC day, model and provider, newest day first: the last 30 days and today, or of those one `date`, or `date_from`
    to `date_to`, both included. The calling key's calls, or with a credit id all of the account's, or one key's."""
    require_scope(caller, "activity")
    first, last = _days(date, date_from, date_to, datetime.now(UTC).date())
    sha256 = None if api_key_hash is None else _named_key(api_key_hash)

    async def work(session: Any) -> list[DailyView]:
        key_id = await _whose(session, settings.pepper, caller, sha256)
        return [DailyView.of(line) for line in await activity(session, caller.account_id, first, last, key_id)]

    return DailyAnswer(await reads.transaction(work))


@get("/api/v1/generation", tags=["OpenRouter"], summary="One call, as OpenRouter tells it")
async def read_generation(
    caller: NamedDependency[Caller], reads: NamedDependency[Database], id: FromQuery[str]
) -> GenerationAnswer:
    """By the `id` of the account's history, its `charge_id`, or the `upstream_id` that its proxy told: the `id` of the
    model's own answer."""
    require_scope(caller, "activity")
    return GenerationAnswer(
        GenerationView.of(id, await reads.transaction(lambda session: generation(session, caller.account_id, id)))
    )


def _days(day: str | None, first: str | None, last: str | None, today: date) -> tuple[date, date]:
    """Raises InvalidField for days that are none, too long ago or the wrong way round, and for both ways to name them."""
    oldest, named = today - DAYS_TOLD * DAY, {"date": day, "date_from": first, "date_to": last}
    days = {name: read_day(text, name) for name, text in named.items()}
    if day is not None and (first is not None or last is not None):
        raise InvalidField("date is one day; give it or date_from and date_to", param="date")
    since, until = days["date"] or days["date_from"] or oldest, days["date"] or days["date_to"] or today
    for name, found in days.items():
        if found is not None and found < oldest:
            raise InvalidField(
                f"{name} may be one of the last {DAYS_TOLD} days, from {oldest} on; GET /activity has what was before",
                param=name,
            )
    if since > until and days["date_to"] is not None:
        raise InvalidField("date_to is before date_from", param="date_to")
    return since, min(until, today)


def _named_key(text: str) -> bytes:
    sha256 = read_hash(text)
    if sha256 is None:
        raise InvalidField("api_key_hash is the SHA-256 of an API key, 64 hex digits", param="api_key_hash")
    return sha256


async def _whose(session: Any, pepper: Pepper, caller: Caller, sha256: bytes | None) -> uuid.UUID | None:
    """The key whose calls are shown, None for all of the account's."""
    if sha256 is None:
        return caller.key_id
    asked = await key_of_hash(session, pepper, caller.account_id, sha256) or _NOBODY
    return asked if caller.key_id in (None, asked) else _NOBODY


def _generation_ms(call: Row) -> int | None:
    """From the first token on."""
    if call["latency_ms"] is None or call["ttft_ms"] is None:
        return None
    return max(0, int(call["latency_ms"]) - int(call["ttft_ms"]))
