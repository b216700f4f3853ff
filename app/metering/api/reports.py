"""What proxies and gateways report many at a time: settlements that were spooled, and usage as CloudEvents.

Each item has its own verdict, so that one bad item never keeps the others back; and each may be reported again.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from app.kernel.errors import AppError, InvalidField, ModelNotPriced
from app.kernel.money import is_given
from app.kernel.reading import read
from app.kernel.security import Service
from app.keys.verify import KeyOwner, Verifier
from app.metering.api.calls import owner_of, priced_work, ticket_of, told
from app.metering.api.wire import ChargeView, SettleRequest, Sha256Hex, Word, WorkDone
from app.metering.functions import ChargeParams
from app.metering.holds import Ask, Charged, Meter, hold_id_for
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
        items = _each(_settle, data.settles)
        lost = [item for item in items if isinstance(item, SettleRequest) and item.hold_id is None]
        looked_up = iter(await _at_once(partial(ticket_of, service, verifier, meter), lost))

        async def used(item: SettleRequest) -> ChargeParams:
            ticket = next(looked_up) if item.hold_id is None else await ticket_of(service, verifier, meter, item)
            if isinstance(ticket, AppError):
                raise ticket
            return (await priced_work(pricer, ticket, item)).params(ticket, service.name)

        used_items = await _each_in_turn(used, items)
        items.clear()  # thousands may wait: the less there is of each, the faster all is read again
        charged = await _charged(meter, used_items)
        return Verdicts.of([_verdict(each) for each in charged])

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
        is_batch = bytes(data).lstrip().startswith(b"[")
        raws = read(data, list[msgspec.Raw]) if is_batch else [data]
        if not 1 <= len(raws) <= MAX_ITEMS:
            raise InvalidField(f"a batch has 1 to {MAX_ITEMS} events, got {len(raws)}")
        events = _each(_event, raws)
        keys = list({event.key for event in events if isinstance(event, _Event) and event.key is not None})
        owners = dict(zip(keys, await _at_once(partial(owner_of, verifier, None), keys), strict=True))
        moment = await pricer.moment() if keys else None

        async def used(event: _Event) -> ChargeParams:
            owner = None if event.key is None else owners[event.key]
            if isinstance(owner, AppError):
                raise owner
            try:
                if owner is None:
                    return await _held_for(event.told.data, service, meter, pricer)
                assert moment is not None
                return await _unheld(event.told, owner, moment, service, pricer)
            except (InvalidField, ModelNotPriced) as error:  # priced_work knows nothing of what is around the data
                raise type(error)(error.message, param=error.param and f"data.{error.param}") from None

        used_events = await _each_in_turn(used, events)
        ids = [event.told.id if isinstance(event, _Event) else None for event in events]
        events.clear()  # thousands may wait: the less there is of each, the faster all is read again
        charged = await _charged(meter, used_events)
        if not is_batch and isinstance(charged[0], AppError):
            raise charged[0]
        return Verdicts.of([_verdict(each, id_) for each, id_ in zip(charged, ids, strict=True)])


# --- each item by itself --------------------------------------------------------------------------------
#
# One caller waits for all, so that a task for each would be for nothing, and take as long as all else does: they are made
# ready one after the other, and charged at once. What is wrong with one is kept in its place.

_T = TypeVar("_T")
_U = TypeVar("_U")


def _each(work: Callable[[_T], _U], items: Iterable[_T]) -> list[_U | AppError]:
    """What `work` makes of each."""
    made: list[_U | AppError] = []
    for item in items:
        try:
            made.append(work(item))
        except AppError as error:
            made.append(error)
    return made


async def _each_in_turn(work: Callable[[_T], Awaitable[_U]], items: Iterable[_T | AppError]) -> list[_U | AppError]:
    """What `work` makes of each. A failure of ours is the whole request's: it may be sent again."""
    made: list[_U | AppError] = []
    for item in items:
        try:
            made.append(item if isinstance(item, AppError) else await work(item))
        except AppError as error:
            if error.status >= 500:
                raise
            made.append(error)
    return made


async def _at_once(work: Callable[[_T], Awaitable[_U]], items: Sequence[_T]) -> list[_U | AppError]:
    """The same for what the database is asked for."""
    return [made for [made] in await asyncio.gather(*(_each_in_turn(work, [item]) for item in items))] if items else []


async def _charged(meter: Meter, used: Sequence[ChargeParams | AppError]) -> list[ChargeView | AppError]:
    due = [each for each in used if isinstance(each, ChargeParams)]
    taken = iter(await meter.take(due))
    charged: list[ChargeView | AppError] = []
    for each in used:
        found = each if isinstance(each, AppError) else next(taken)
        if isinstance(each, ChargeParams) and isinstance(found, Charged):
            charged.append(ChargeView.of(found, each.account_id))
        else:
            assert isinstance(found, AppError)
            charged.append(found)
    return charged


def _verdict(charged: ChargeView | AppError, event_id: str | None = None) -> Verdict:
    if isinstance(charged, AppError):
        return Verdict(charged.status, error=charged.wire())
    return Verdict(200, event_id, charged)


def _settle(raw: msgspec.Raw) -> SettleRequest:
    item: SettleRequest = read(raw, SettleRequest)
    return item


class _Event(msgspec.Struct, frozen=True):
    """An event, and the SHA-256 of the key that it names; None under a hold."""

    told: CloudEvent
    key: str | None


def _event(raw: msgspec.Raw) -> _Event:
    told: CloudEvent = read(raw, CloudEvent)
    return _Event(told, _key(told) if told.data.hold_id is None else None)


def _key(event: CloudEvent) -> str:
    """Raises InvalidField."""
    told, subject = event.data.api_key_hash, event.subject or ""
    if told is not None and _SHA256_HEX.fullmatch(subject) and subject.lower() != told.lower():
        raise InvalidField("api_key_hash and the event's subject name two keys", param="data.api_key_hash")
    sha256_hex = told or subject
    if not _SHA256_HEX.fullmatch(sha256_hex):
        raise InvalidField(
            "give hold_id, or the SHA-256 of the API key as api_key_hash or as the event's subject",
            param="data.api_key_hash",
        )
    return sha256_hex.lower()


async def _held_for(data: UsageData, service: Service, meter: Meter, pricer: Pricer) -> ChargeParams:
    assert data.hold_id is not None
    ticket = meter.opened(service.name, data.hold_id)
    return (await priced_work(pricer, ticket, data)).params(ticket, service.name)


async def _unheld(
    event: CloudEvent,
    owner: KeyOwner,
    moment: tuple[int | None, datetime],
    service: Service,
    pricer: Pricer,
) -> ChargeParams:
    """A call that nothing was held for, by the prices of now."""
    data, (price_version, now) = event.data, moment
    said = data.attributes.said() if data.attributes else {}
    request_id = "event:" + hashlib.sha256(f"{event.source}\x00{event.id}".encode()).hexdigest()
    ticket = HoldTicket(
        owner.account_id, owner.key_id, hold_id_for(service.name, request_id), request_id, None, now, None, price_version,
        data.model, data.endpoint, said,
    )  # fmt: skip
    work = await priced_work(pricer, ticket, data)
    asked = told(data, work.units, said, work.cost_nusd if is_given(data.cost_usd) else None)
    ask = Ask(request_id, work.cost_nusd, data.model, data.endpoint, asked=asked)
    return work.params(ticket, service.name, ask.fingerprint("report", owner, work))
