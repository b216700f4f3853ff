"""Metering once more, as API.md and the docstrings tell it: lists and dicts, one call after the other, no SQL.

What is held or spent is kept nowhere: it is the sum over holds and charges whenever it is asked for. Ids are the
request's own: one service, and so one hold for a request_id on an account. `now` is an argument.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from app.metering.holds import Ask, Work


@dataclass(eq=False, slots=True)
class Window:
    """A further window of a key."""

    start: datetime
    limit: int
    period: str | None

    def start_at(self, now: datetime) -> datetime:
        return max(self.start, begin_of(self.period, now)) if self.period else self.start


@dataclass(eq=False, slots=True)
class Key:
    window: datetime
    limit: int | None = None
    period: str | None = None
    scopes: list[str] | None = None
    models: list[str] | None = None
    is_live: bool = True
    is_disabled: bool = False
    parent: "Key | None" = None
    more: list[Window] = field(default_factory=list)
    call_limit: int | None = None

    def window_at(self, now: datetime) -> datetime:
        return max(self.window, begin_of(self.period, now)) if self.period else self.window

    def line(self) -> "list[Key]":
        """The key and all above it, the nearest first."""
        return [self, *(self.parent.line() if self.parent else ())]

    def begins(self, now: datetime) -> datetime:
        """What a call that begins now counts from: with one window and nobody above it is known by the window."""
        return now if self.parent or self.more else self.window_at(now)


@dataclass(eq=False, slots=True)
class Hold:
    key: Key
    request: Any
    window: datetime
    amount: int
    expires_at: datetime
    on_expiry: str = "captured"
    price_version: int | None = None
    captured: int = 0
    state: str = "open"


@dataclass(eq=False, slots=True)
class Charge:
    key: Key
    window: datetime
    cost: int
    balance_after: int
    held_after: int
    flags: str
    lines: Any = None
    refunded: int = 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an opaque hold_id says."""

    request_id: str
    key: Key
    window: datetime


@dataclass(frozen=True, slots=True)
class Refusal:
    """By the name of its error; `told` are the figures that explain it."""

    name: str
    told: tuple[Any, ...] = ()


@dataclass(eq=False, slots=True)
class Account:
    keys: list[Key]
    entries: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Kind, what it is of, amount, balance after it."""
    floor: int = 0
    low: int | None = None
    is_frozen: bool = False
    holds: dict[str, Hold] = field(default_factory=dict)
    charges: dict[str, Charge] = field(default_factory=dict)
    said_low: int = 0

    @property
    def posted(self) -> int:
        return sum(amount for _, _, amount, _ in self.entries)

    def held(self, key: Key | None = None) -> int:
        return sum(
            hold.amount
            for hold in self.holds.values()
            if hold.state == "open" and (key is None or key in hold.key.line())
        )

    def spent(self, key: Key, now: datetime) -> int:
        return self.spent_since(key, key.window_at(now))

    def spent_since(self, key: Key, start: datetime) -> int:
        """By the key and all below it, in calls that began then."""
        return sum(
            charge.cost - charge.refunded
            for charge in self.charges.values()
            if charge.window >= start and key in charge.key.line()
        )

    def lifetime(self, key: Key) -> int:
        return sum(charge.cost - charge.refunded for charge in self.charges.values() if charge.key is key)

    def post(self, kind: str, reference: str, amount: int) -> None:
        self.entries.append((kind, reference, amount, self.posted + amount))

    # --- the verbs ---

    def authorize(self, key: Key, ask: Ask, now: datetime) -> tuple[Any, ...] | Refusal:
        """Holds money, or what there is from the least that will do. Amount, available, whether a repeat, price version, ticket."""
        hold, request = self.holds.get(ask.request_id), asked("authorize", key, ask)
        if hold.request != request if hold else ask.request_id in self.charges:
            return Refusal("RequestIdReuse")
        if hold and (hold.state != "open" or hold.expires_at <= now):
            return Refusal("HoldClosed", ("expired" if hold.state == "open" else hold.state,))
        refusal = self._may_not(key, ask)
        if refusal:
            return refusal
        if hold is None:
            short = self._short_of(key, ask.needed_nusd, now)
            if short:
                return short
            amount = min(ask.amount_nusd, self.posted - self.held() - self.floor)
            amount = min([amount, *(limit - spent - held for limit, spent, held in self.bounds(key, now))])
            amount = min([amount, *(each.call_limit for each in key.line() if each.call_limit is not None)])
            expires_at = now + timedelta(seconds=ask.ttl_seconds)
            hold = Hold(key, request, key.begins(now), amount, expires_at, ask.on_expiry, ask.price_version)
            self.holds[ask.request_id], is_repeat = hold, False
        else:
            is_repeat = True
        available = max(0, self.posted - self.held() - self.floor)
        return hold.amount, available, is_repeat, hold.price_version, Ticket(ask.request_id, key, hold.window)

    def settle(self, ticket: Ticket, work: Work) -> Charge:
        """Always charges, whatever the hold said; once."""
        if ticket.request_id not in self.charges:
            hold = self.holds.get(ticket.request_id)
            if hold is None:
                flags = ["hold_missing", work.flags]
                self._charge(ticket.request_id, ticket.key, ticket.window, work.cost_nusd, flags, work.lines)
            else:
                cost = max(work.cost_nusd, hold.amount) if work.at_least_the_hold else work.cost_nusd
                flags = [
                    "late" if hold.state != "open" else None,
                    "above_hold" if cost > hold.amount else None,
                    work.flags,
                ]
                hold.state = "settled"
                self._charge(ticket.request_id, hold.key, hold.window, cost, flags, work.lines)
        return self.charges[ticket.request_id]

    def report(self, key: Key, ask: Ask, work: Work, now: datetime) -> Charge | Refusal:
        """Charges a call that nothing was held for, whatever is left."""
        return self._known("report", key, ask, work) or self._made(
            "report", key, ask, work, now, ["no_hold", work.flags]
        )

    def charge(self, key: Key, ask: Ask, work: Work, now: datetime) -> Charge | Refusal:
        """Authorize and settle in one."""
        return (
            self._known("charge", key, ask, work)
            or self._may_not(key, ask)
            or self._short_of(key, ask.amount_nusd, now)
            or self._made("charge", key, ask, work, now, [work.flags])
        )

    def release(self, ticket: Ticket) -> tuple[int, int] | Refusal:
        """Posted and held. What was captured is spent, and not released."""
        hold = self.holds.get(ticket.request_id)
        if hold is None:
            return Refusal("HoldNotFound")
        if hold.state == "settled":
            return Refusal("HoldClosed", ("settled",))
        if hold.state == "open" and hold.captured:
            return Refusal("HoldCaptured", (hold.captured,))
        if hold.state == "open":
            hold.state = "released"
        return self.posted, self.held()

    def extend(self, ticket: Ticket, ttl_seconds: int, captured: int, now: datetime) -> tuple[int, ...] | Refusal:
        """Amount, posted, held, floor."""
        hold = self.holds.get(ticket.request_id)
        if hold is None:
            return Refusal("HoldNotFound")
        if hold.state != "open":
            return Refusal("HoldClosed", (hold.state,))
        hold.expires_at = max(hold.expires_at, now + timedelta(seconds=ttl_seconds))
        hold.amount, hold.captured = max(hold.amount, captured), max(hold.captured, captured)
        return hold.amount, self.posted, self.held(), self.floor

    def refund(self, request_id: str, amount: int | None) -> tuple[int, int] | Refusal:
        """Once for each charge; a repeat gets the first answer. Amount and balance after it."""
        charge = self.charges[request_id]
        due = charge.cost if amount is None else amount
        if not 0 < due <= charge.cost:
            return Refusal("InvalidField")
        for kind, reference, given, balance_after in self.entries:
            if (kind, reference) == ("refund", request_id):
                return (due, balance_after) if given == due else Refusal("AlreadyRefunded")
        self.post("refund", request_id, due)
        charge.refunded = due
        return due, self.posted

    def due(self, now: datetime) -> dict[str, tuple[int, str]]:
        """What an expiry now would charge: request_id → cost and flag."""
        found = {}
        for request_id, hold in self.holds.items():
            if hold.state == "open" and hold.expires_at < now:
                if hold.on_expiry == "hold":
                    found[request_id] = hold.amount, "hold_expired"
                elif hold.on_expiry == "captured" and hold.captured:
                    found[request_id] = hold.captured, "captured"
        return found

    def expire(self, now: datetime, order: Iterable[str]) -> None:
        """Closes what is overdue: charges first what is due, in `order`, then frees the rest."""
        due = self.due(now)
        for request_id in sorted(due, key=list(order).index):
            hold, (cost, flag) = self.holds[request_id], due[request_id]
            hold.state = "settled"
            self._charge(request_id, hold.key, hold.window, cost, [flag], None, tells=False)
        for hold in self.holds.values():
            if hold.state == "open" and hold.expires_at < now:
                hold.state = "expired"

    def patch(
        self,
        key: Key,
        limit: int | None,
        period: str | None,
        now: datetime,
        more: Iterable[tuple[str | None, int]] = (),
    ) -> None:
        """A window of another period starts at 0, and open holds of the key and all below it move along to it."""
        had = {key.period: key.window} | {each.period: each.start for each in key.more}
        key.limit, key.period, key.window = limit, period, had.get(period, now)
        key.more = [Window(had.get(period, now), limit, period) for period, limit in more]
        if {key.period, *(each.period for each in key.more)} - had.keys():
            for hold in self.holds.values():
                if hold.state == "open" and key in hold.key.line():
                    hold.window = now

    def revoke(self, key: Key) -> None:
        """The key, and all below it."""
        for each in self.keys:
            each.is_live = each.is_live and key not in each.line()

    def bounds(self, key: Key, now: datetime) -> list[tuple[int, int, int]]:
        """Limit, spent and held of every window of the key and of all above it."""
        found = []
        for each in key.line():
            if each.limit is not None:
                found.append((each.limit, self.spent(each, now), self.held(each)))
            found += [
                (window.limit, self.spent_since(each, window.start_at(now)), self.held(each)) for window in each.more
            ]
        return found

    # --- what they share ---

    def _known(self, verb: str, key: Key, ask: Ask, work: Work) -> Charge | Refusal | None:
        """A request_id that was used: the same request gets its charge again, another one nothing."""
        hold, charge = self.holds.get(ask.request_id), self.charges.get(ask.request_id)
        if hold is None and charge is None:
            return None
        is_same = hold is not None and hold.request == asked(verb, key, ask, work)
        return charge if is_same and charge else Refusal("RequestIdReuse")

    def _made(self, verb: str, key: Key, ask: Ask, work: Work, now: datetime, flags: list[str | None]) -> Charge:
        hold = Hold(key, asked(verb, key, ask, work), key.begins(now), 0, now, state="settled")
        self.holds[ask.request_id] = hold
        self._charge(ask.request_id, key, hold.window, work.cost_nusd, flags, work.lines)
        return self.charges[ask.request_id]

    def _charge(
        self,
        request_id: str,
        key: Key,
        window: datetime,
        cost: int,
        flags: list[str | None],
        lines: Any,
        tells: bool = True,
    ) -> None:
        self.post("usage", request_id, -cost)
        told = ",".join(flag for flag in flags if flag)
        self.charges[request_id] = Charge(key, window, cost, self.posted, self.held(), told, lines)
        self.said_low += tells and self.low is not None and self.posted < self.low

    def _may_not(self, key: Key, ask: Ask) -> Refusal | None:
        names = {ask.model, *ask.model_names} if ask.model else set()
        for each in key.line():
            if not each.is_live or each.is_disabled:
                return Refusal("InvalidApiKey")
            if self.is_frozen:
                return Refusal("AccountFrozen")
            if each.scopes is not None and "spend" not in each.scopes:
                return Refusal("MissingScope")
            if each.models is not None and not names & set(each.models):
                return Refusal("ModelNotAllowed")
        return None

    def _short_of(self, key: Key, needed: int, now: datetime) -> Refusal | None:
        """What the money says. Nothing is sold to whom not a nano-dollar is left, be it for nothing."""
        posted, held = self.posted - self.floor, self.held()
        most = min((each.call_limit for each in key.line() if each.call_limit is not None), default=needed)
        if needed > most:
            return Refusal("KeyLimitExceeded", (needed, most))
        bounds = self.bounds(key, now)
        used_up = [limit - spent - held for limit, spent, held in bounds if limit - spent < max(needed, 1)]
        if used_up:
            return Refusal("KeyLimitExceeded", (needed, max(0, min(used_up))))
        left = min((limit - spent - held for limit, spent, held in bounds), default=needed)
        if left < needed:
            return Refusal("FundsHeld", (needed, max(0, left)))
        if posted < max(needed, 1):
            return Refusal("InsufficientBalance", (needed, max(0, posted - held)))
        if posted - held < needed:
            return Refusal("FundsHeld", (needed, max(0, posted - held)))
        return None


def asked(verb: str, key: Key, ask: Ask, work: Work | None = None) -> Any:
    """What makes two requests under one id the same."""
    price: Any = ask.asked
    if price is None and work is None:
        price = ask.amount_nusd, ask.min_nusd, ask.attributes
    elif price is None and work is not None:
        lines = work.lines or {}
        price = work.served_model, work.provider, work.units, work.outcome, lines.get("attributes")
        price += (None if work.lines else work.cost_nusd,)
    return verb, id(key), ask.model, ask.endpoint, ask.ttl_seconds, ask.on_expiry, price


def begin_of(period: str, now: datetime) -> datetime:
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    back = {"day": 0, "week": day.weekday(), "month": day.day - 1}[period]
    return day - timedelta(days=back)
