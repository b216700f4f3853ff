"""What proxies and gateways report many at a time: settlements that were spooled, and usage as CloudEvents.

Each item has its own verdict, so that one bad item never keeps the others back; and each may be reported again.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from app.kernel.errors import AppError, InvalidApiKey, InvalidField, ModelNotPriced
from app.kernel.reading import read
from app.kernel.security import Service
from app.keys.verify import KeyOwner, Verifier
from app.metering.api.calls import (
    ChargeView,
    SettleRequest,
    Sha256Hex,
    Word,
    WorkDone,
    charged_for,
    priced_work,
    settled,
    told,
)
from app.metering.holds import Ask, Meter, hold_id_for
from app.metering.priced import Pricer
from app.metering.ticket import HoldTicket

MAX_ITEMS: Final = 500
MAX_BODY_BYTES: Final = 1024 * 1024
"""Of these routes: five hundred settlements do not fit into what other requests may have."""

ROUTES: Final = ("/v1/meter/settle/batch", "/v1/meter/events")
_SHA256_HEX: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)

SettleItem = Annotated[msgspec.Raw, msgspec.Meta(extra={"holds": SettleRequest})]


class SettleBatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """1 to 500 settlements, each as `/v1/meter/settle` takes it."""

    settles: Annotated[list[SettleItem], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)]


class UsageData(WorkDone, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A call that was made: under a hold, or by a key that nothing was held for."""

    hold_id: str | None = None
    api_key_hash: Sha256Hex | None = None
    model: Word | None = None
    endpoint: Word | None = None


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A CloudEvent 1.0 of a call's usage. `source` and `id` name the call for ever; further attributes are ignored."""

    specversion: Literal["1.0"]
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    source: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    type: Word
    data: UsageData
    subject: str | None = None


_Batch = Annotated[list[CloudEvent], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)]
Events = Annotated[msgspec.Raw, msgspec.Meta(extra={"holds": CloudEvent | _Batch})]


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one item: the `status` and `error` it would have had alone, or its charge."""

    status: int
    id: str | None = None
    charge: ChargeView | None = None
    error: dict[str, Any] | None = None


class Verdicts(msgspec.Struct, frozen=True):
    """In the order of the items."""

    results: list[Verdict]
    charged: int
    refused: int

    @classmethod
    def of(cls, results: list[Verdict]) -> "Verdicts":
        charged = sum(each.status == 200 for each in results)
        return cls(results, charged, len(results) - charged)


class ReportsController(Controller):
    """Settlements and usage in bulk. Needs a service token; bodies may have 1 MiB here."""

    path = "/v1/meter"
    tags = ("Metering",)
    request_max_body_size = MAX_BODY_BYTES

    @post("/settle/batch", status_code=200, summary="Settle up to 500 calls")
    async def settle_batch(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        data: JSONBody[SettleBatchRequest],
    ) -> Verdicts:
        """For a proxy that spooled what it could not settle at once. Each item is settled as if it had come alone."""

        async def settle(raw: msgspec.Raw) -> Verdict:
            return Verdict(200, charge=await settled(service, verifier, meter, pricer, read(raw, SettleRequest)))

        return Verdicts.of(await _each(data.settles, settle))

    @post("/events", status_code=200, summary="Usage as CloudEvents")
    async def events(
        self,
        service: NamedDependency[Service],
        verifier: NamedDependency[Verifier],
        meter: NamedDependency[Meter],
        pricer: NamedDependency[Pricer],
        data: JSONBody[Events],
    ) -> Verdicts:
        """One CloudEvent 1.0, or a batch of up to 500, with `data` as `/v1/meter/settle` takes it. Usage of a key that
        nothing was held for (`api_key_hash`, or the event's `subject`) is charged too, whatever is left: it was used, and is
        flagged `no_hold`. The same `source` and `id` again answers the same charge. A single event that is refused is refused
        as a request."""

        async def record(raw: msgspec.Raw) -> Verdict:
            event = read(raw, CloudEvent)
            try:
                return Verdict(200, event.id, await _recorded(event, service, verifier, meter, pricer))
            except (InvalidField, ModelNotPriced) as error:  # charged_for knows nothing of what is around the data
                raise type(error)(error.message, param=error.param and f"data.{error.param}") from None

        if not bytes(data).lstrip().startswith(b"["):
            return Verdicts.of([await record(data)])
        events = read(data, list[msgspec.Raw])
        if not 1 <= len(events) <= MAX_ITEMS:
            raise InvalidField(f"a batch has 1 to {MAX_ITEMS} events, got {len(events)}")
        return Verdicts.of(await _each(events, record))


async def _each(items: Sequence[msgspec.Raw], charge: Callable[[msgspec.Raw], Awaitable[Verdict]]) -> list[Verdict]:
    """All at once, so that they are decided together. A failure of ours is the whole request's: it may be sent again."""

    async def verdict(raw: msgspec.Raw) -> Verdict:
        try:
            return await charge(raw)
        except AppError as error:
            if error.status >= 500:
                raise
            return Verdict(error.status, error=error.wire())

    return list(await asyncio.gather(*(verdict(raw) for raw in items)))


async def _recorded(
    event: CloudEvent, service: Service, verifier: Verifier, meter: Meter, pricer: Pricer
) -> ChargeView:
    """Charge an event's call: under its hold, or by its key where nothing was held."""
    data = event.data
    said = data.attributes.said() if data.attributes else {}
    if data.hold_id is not None:
        return await charged_for(service, meter, pricer, meter.opened(service.name, data.hold_id), data)
    owner = await _owner(event, verifier)
    request_id = "event:" + hashlib.sha256(f"{event.source}\x00{event.id}".encode()).hexdigest()
    price_version, now = await pricer.moment()
    unheld = HoldTicket(
        owner.account_id, owner.key_id, hold_id_for(service.name, request_id), request_id, None, now, None, price_version,
        data.model, data.endpoint, said,
    )  # fmt: skip
    work = await priced_work(pricer, unheld, data)
    ask = Ask(request_id, work.cost_nusd, data.model, data.endpoint, asked=told(data, said))
    return ChargeView.of(await meter.report(service.name, owner, ask, work), owner.account_id)


async def _owner(event: CloudEvent, verifier: Verifier) -> KeyOwner:
    """Whose key the event names. Raises InvalidField and InvalidApiKey."""
    told, subject = event.data.api_key_hash, event.subject or ""
    if told is not None and _SHA256_HEX.fullmatch(subject) and subject.lower() != told.lower():
        raise InvalidField("api_key_hash and the event's subject name two keys", param="api_key_hash")
    sha256_hex = told or subject
    if not _SHA256_HEX.fullmatch(sha256_hex):
        raise InvalidField(
            "give hold_id, or the SHA-256 of the API key as api_key_hash or as the event's subject",
            param="api_key_hash",
        )
    owner = await verifier.owner_of(secret=None, sha256=bytes.fromhex(sha256_hex))
    if owner is None:
        raise InvalidApiKey
    return owner
