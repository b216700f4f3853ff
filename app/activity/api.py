"""How HTTP asks what was called and what it cost."""

import re
from datetime import UTC, date, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, QueryParameter

from app.activity.calendar import DAY, first_id, midnight, moment_of
from app.activity.daily import Days, daily
from app.activity.explain import Explained, Line, explain
from app.activity.history import Calls, calls, query_type
from app.activity.spreadsheet import csv_text, wants_csv
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField
from app.kernel.money import JsonNumber, number, usd
from app.kernel.pages import DEFAULT_LIMIT, Numbered, from_cursor, page_size, to_cursor
from app.kernel.security import Caller
from app.keys.verify import require_scope
from app.ledger.charge import ChargeId

Outcome = Literal["completed", "client_disconnected", "partial"]
FromDate = Annotated[str | None, QueryParameter(name="from")]
_MAX_TEXT: Final = 200
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)
_NOBODY: Final = UUID(int=0)
"""No key's id: what a key sees of another one without `all_keys`."""


class CallView(msgspec.Struct, frozen=True):
    """One call that was charged. `price_in_usd` is what it cost, before a refund."""

    id: UUID
    timestamp: datetime
    model: str | None
    provider: str | None
    endpoint: str | None
    input_count: int
    output_count: int
    price_in_usd: JsonNumber
    query_type: str
    query_source: str
    api_key_id: UUID
    status: Outcome
    error_code: str | None
    request_id: str

    @classmethod
    def of(cls, call: Row) -> "CallView":
        units = call["units"] or {}
        return cls(
            id=call["id"],
            timestamp=moment_of(call["id"]),
            model=call["model"],
            provider=call["provider"],
            endpoint=call["endpoint"],
            input_count=units.get("input_tokens") or 0,
            output_count=units.get("output_tokens") or 0,
            price_in_usd=usd(call["cost_nusd"]),
            query_type=query_type(units, call["endpoint"]),
            query_source="api",
            api_key_id=call["key_id"],
            status=call["outcome"],
            error_code=None,  # a call that failed before it cost anything is released, and is not here
            request_id=call["request_id"],
        )

    def cells(self) -> list[str | None]:
        """As in the JSON, each as text."""
        return [_cell(getattr(self, name)) for name in self.__struct_fields__]


class HistoryPage(msgspec.Struct, frozen=True):
    data: list[CallView]
    next_cursor: str | None
    status: str = "success"


class DayView(msgspec.Struct, frozen=True):
    """The calls of one UTC day, model and key."""

    day: date
    model: str | None
    api_key_id: UUID
    requests: int
    input_tokens: int
    output_tokens: int
    cost_usd: JsonNumber
    refunded_usd: JsonNumber

    @classmethod
    def of(cls, line: Row) -> "DayView":
        same = {name: line[name] for name in ("day", "requests", "input_tokens", "output_tokens")}
        return cls(
            **same,
            model=line["model"] or None,
            api_key_id=line["key_id"],
            cost_usd=usd(line["cost_nusd"]),
            refunded_usd=usd(line["refunded_nusd"]),
        )


class ActivityPage(msgspec.Struct, frozen=True):
    data: list[DayView]
    next_cursor: str | None


class PriceLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """`units` / `per_units` × `unit_price_usd` × `markup` is `amount_usd`: exactly, but for a last place that has no end."""

    kind: str
    name: str
    units: int
    unit_price_usd: JsonNumber
    markup: JsonNumber
    amount_usd: JsonNumber
    per_units: int = 1

    @classmethod
    def of(cls, line: Line) -> "PriceLine":
        return cls(
            line.kind, line.name, line.units, number(line.price_pusd, 12), number(line.markup_ppm, 6),
            number(round(line.amount_ausd), 18), line.per_units,
        )  # fmt: skip


class Explanation(msgspec.Struct, frozen=True):
    """Why a call cost what it did: its lines and `rounding_usd` add up to `charged_usd`."""

    id: UUID
    charge_id: str
    timestamp: datetime
    model: str | None
    served_model: str | None
    priced_as: str | None
    provider: str | None
    price_version: int | None
    flags: list[str]
    lines: list[PriceLine]
    exact_usd: JsonNumber
    rounding_usd: JsonNumber
    charged_usd: JsonNumber
    refunded_usd: JsonNumber
    net_usd: JsonNumber

    @classmethod
    def of(cls, found: Explained) -> "Explanation":
        charge = found.charge
        same = {
            name: charge[name] for name in ("id", "model", "served_model", "priced_as", "provider", "price_version")
        }
        return cls(
            **same,
            charge_id=str(ChargeId(charge["account_id"], charge["id"])),
            timestamp=moment_of(charge["id"]),
            flags=[flag for flag in charge["flags"].split(",") if flag],
            lines=[PriceLine.of(line) for line in found.lines],
            exact_usd=number(round(found.exact_ausd), 18),
            rounding_usd=number(round(found.rounding_ausd), 18),
            charged_usd=usd(charge["cost_nusd"]),
            refunded_usd=usd(charge["refunded_nusd"]),
            net_usd=usd(charge["cost_nusd"] - charge["refunded_nusd"]),
        )


@get("/queries/history", tags=["Activity"], summary="List calls")
async def list_history(
    request: Request[Any, Any, Any],
    caller: NamedDependency[Caller],
    reads: NamedDependency[Database],
    from_: FromDate = None,
    to: FromQuery[str | None] = None,
    model: FromQuery[str | None] = None,
    endpoint: FromQuery[str | None] = None,
    status: FromQuery[Outcome | None] = None,
    api_key_id: FromQuery[UUID | None] = None,
    all_keys: FromQuery[bool] = False,
    limit: FromQuery[int | None] = None,
    cursor: FromQuery[str | None] = None,
    page: FromQuery[int | None] = None,
    page_count: FromQuery[int | None] = None,
    offset: FromQuery[int | None] = None,
    start_date: FromQuery[str | None] = None,
    end_date: FromQuery[str | None] = None,
) -> Response[HistoryPage]:
    """Every call that was charged, newest first: the calling key's, or with `all_keys=true` or a credit id all of the
    account. With `Accept: text/csv` the same page as CSV, and its `next_cursor` in `X-Next-Cursor`.

    Go on with `cursor`, which loses no call and shows none twice while new ones come. Readers made for PayPerQ page by
    `page` and `page_count`, or by `limit` and `offset`, and say `start_date` and `end_date` for `from` and `to`."""
    require_scope(caller, "activity")
    since = _moment(_either(from_, start_date, "start_date"), "from" if start_date is None else "start_date")
    until = _moment(_either(to, end_date, "end_date"), "to" if end_date is None else "end_date", is_end=True)
    wanted = Calls(
        _whose(caller, api_key_id, all_keys), first_id(since) if since else None, first_id(until) if until else None,
        _text(model, "model"), _text(endpoint, "endpoint"), status,
    )  # fmt: skip
    asked = Numbered.of(limit=limit, page=page, page_count=page_count, offset=offset, cursor=cursor)
    size, before = asked.size, from_cursor(cursor, tuple[UUID])
    found = await reads.transaction(
        lambda session: calls(
            session,
            caller.account_id,
            wanted,
            limit=size + 1,
            before=before[0] if before else None,
            skipped=asked.skipped,
        )
    )
    last = found[size - 1] if len(found) > size else None
    answer = HistoryPage([CallView.of(call) for call in found[:size]], to_cursor(last["id"]) if last else None)
    return _as_csv(answer) if wants_csv(request.headers.get("accept", "")) else Response(answer)


@get("/activity", tags=["Activity"], summary="Calls per day")
async def list_activity(
    caller: NamedDependency[Caller],
    reads: NamedDependency[Database],
    from_: FromDate = None,
    to: FromQuery[str | None] = None,
    model: FromQuery[str | None] = None,
    api_key_id: FromQuery[UUID | None] = None,
    all_keys: FromQuery[bool] = False,
    limit: FromQuery[int] = DEFAULT_LIMIT,
    cursor: FromQuery[str | None] = None,
) -> ActivityPage:
    """Per UTC day, key and model, newest day first: the calling key's calls, or with `all_keys=true` or a credit id all
    of the account's. `from` and `to` are days, both included. A refund counts to the day of its call."""
    require_scope(caller, "activity")
    first, last_day = _moment(from_, "from"), _moment(to, "to")
    wanted = Days(
        first.date() if first else None, last_day.date() if last_day else None,
        _whose(caller, api_key_id, all_keys), _text(model, "model"),
    )  # fmt: skip
    size, after = page_size(limit), from_cursor(cursor, tuple[date, UUID, str])
    _text(after[2] if after else None, "cursor")
    found = await reads.transaction(
        lambda session: daily(session, caller.account_id, wanted, limit=size + 1, after=after)
    )
    last = found[size - 1] if len(found) > size else None
    return ActivityPage(
        [DayView.of(line) for line in found[:size]],
        to_cursor(last["day"], last["key_id"], last["model"]) if last else None,
    )


@get("/activity/{charge_id:str}/explain", tags=["Activity"], summary="Explain a charge")
async def explain_charge(
    caller: NamedDependency[Caller], reads: NamedDependency[Database], charge_id: FromPath[str]
) -> Explanation:
    """The price lines that add up, to the nano-dollar, to what was charged; by a call's `id` or its `charge_id`. A call
    that came already priced has one line, of kind `call`."""
    require_scope(caller, "activity")
    return Explanation.of(await reads.transaction(lambda session: explain(session, caller.account_id, charge_id)))


def _whose(caller: Caller, asked: UUID | None, all_keys: bool) -> UUID | None:
    """The key whose calls are shown, None for all of the account's."""
    own = None if all_keys else caller.key_id
    if own is None or asked is None:
        return asked or own
    return own if asked == own else _NOBODY


def _either(ours: str | None, theirs: str | None, their_name: str) -> str | None:
    """Of two names of one parameter. Raises InvalidField where both were given, and not the same."""
    if ours is not None and theirs is not None and ours != theirs:
        raise InvalidField(f"{their_name} is another name of what was given too, and not the same", param=their_name)
    return ours if theirs is None else theirs


def _moment(text: str | None, param: str, *, is_end: bool = False) -> datetime | None:
    """A day or a time, UTC where it does not say; a day that is an end is meant whole. Raises InvalidField."""
    if text is None:
        return None
    try:
        if not _MOMENT.fullmatch(text):  # fromisoformat takes weeks and other spellings too
            raise ValueError
        if len(text) == 10:
            day = midnight(date.fromisoformat(text))
            return day + DAY if is_end else day
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidField(
            f"{param} must be a day or a time, such as 2026-01-31 or 2026-01-31T12:00:00Z", param=param
        ) from None


def _text(text: str | None, param: str) -> str | None:
    """Raises InvalidField for what no name can be, and PostgreSQL would not take."""
    if text is not None and (len(text) > _MAX_TEXT or not all(" " <= char != "\x7f" for char in text)):
        raise InvalidField(f"{param} has at most {_MAX_TEXT} characters, none of them a control character", param=param)
    return text


def _as_csv(page: HistoryPage) -> Response[Any]:
    text = csv_text(CallView.__struct_fields__, (call.cells() for call in page.data))
    headers = {"Content-Disposition": 'attachment; filename="history.csv"'}
    if page.next_cursor is not None:
        headers["X-Next-Cursor"] = page.next_cursor
    return Response(text, media_type="text/csv", headers=headers)


def _cell(value: Any) -> str | None:
    if isinstance(value, msgspec.Raw):
        return bytes(value).decode()
    return None if value is None else str(msgspec.to_builtins(value))


handlers = (list_history, list_activity, explain_charge)
