"""The meter: may this call be made, and what did it come to? Everything a proxy needs of Satmeter."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import msgspec

from app.client.retry import Asking, Away
from app.client.shown import Shown
from app.client.shown import key_hash as key_hash
from app.client.spool import (
    Asked,
    Begun,
    Captured,
    Known,
    Owed,
    Spool,
    SpoolFile,
    Told,
    giving_back,
    outcomes,
    settling,
    unfinished,
)
from app.client.telling import Outcome, Telling, error_of
from app.client.transport import Answer, HttpxTransport, Transport
from app.client.wire import (
    Allowed,
    Charged,
    Denied,
    Done,
    Estimate,
    Extended,
    Hold,
    OnExpiry,
    Refunded,
    Refused,
    Unavailable,
    Usage,
    Verified,
    amount,
    word,
)

log = logging.getLogger("satmeter.client")

_T = TypeVar("_T", Allowed, Verified, Charged)
SoFar = Callable[[], Usage | None]
"""What a call has used by now; None: as before."""


class Meter:
    """One Satmeter, asked as one service. An async context manager; one for a process.

    `spool` is a folder that survives the process (None: a crash loses what was not told); `spool_bytes` bounds it: when
    it is full, new calls are answered 503, and none that began is lost. `ask_seconds` bounds how long an authorize waits for
    an answer once it is its turn (a burst waits in line for as long as others are answered), `settle_seconds` how long a settle waits for others to go with, `capture_seconds` how often what a stream has
    produced is written down here (a killed process loses less than that), and five times that, told to Satmeter.

    Nothing here raises for want of Satmeter: a question is answered Unavailable, and what is owed is told later.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        spool: Path | None,
        transport: Transport | None = None,
        ask_seconds: float = 2.0,
        settle_seconds: float = 0.05,
        capture_seconds: float = 1.0,
        spool_bytes: int = 64 * 1024 * 1024,
        retry_after_seconds: int = 2,
        drain_seconds: float = 5.0,
    ) -> None:
        self._asking = Asking(url, token, transport or HttpxTransport())
        self._spool = Spool(spool, max_bytes=spool_bytes)
        self._telling = Telling(self._asking, self._spool, every_seconds=settle_seconds)
        self._ask_seconds, self._capture_seconds = ask_seconds, capture_seconds
        self._retry_after_seconds, self._drain_seconds = retry_after_seconds, drain_seconds
        self._calls: dict[str, _Call] = {}
        self._adopted: list[SpoolFile] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Meter":
        self.open()
        return self

    def open(self) -> None:
        """Begin, within a running event loop: take over what the gone left behind, and tell it."""
        self._spool.open()
        self._telling.start()
        self._adopt()
        self._start(self._keep_books())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> int:
        """Tell what is owed, for `drain_seconds` at most, and end. What is left (returned) is in the spool for the next
        process, with every call that was forwarded and not settled."""
        left = await self._telling.drain(self._drain_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._telling.close()
        for file in self._adopted:
            file.close()
        await self._spool.close()
        await self._asking.close()
        return left

    async def drain(self, seconds: float = 30.0) -> int:
        """Wait until Satmeter was told all that is owed, `seconds` at most. Returns how much is left then."""
        return await self._telling.drain(seconds)

    @property
    def owed(self) -> int:
        """How many things Satmeter is yet to be told."""
        return self._telling.left

    # --- before a call ---

    async def authorize(
        self,
        api_key: Shown | str | None,
        *,
        model: str | None = None,
        endpoint: str | None = None,
        estimate: Estimate | None = None,
        max_cost_usd: Decimal | None = None,
        features: Sequence[str] = (),
        mode: Literal["strict", "clamp"] = "strict",
        min_output_tokens: int | None = None,
        max_hold_usd: Decimal | None = None,
        ttl_seconds: int = 900,
        on_expiry: OnExpiry | None = None,
    ) -> Allowed | Denied:
        """Hold money for a call, under a new id of ours. Give `estimate` or `max_cost_usd`.

        Unavailable where Satmeter cannot be asked within `ask_seconds` or the spool is full; what it may have held
        without our knowing is given back.
        """
        shown = Shown.of(api_key)
        if not shown:
            return _NO_KEY
        if not self._spool.has_room:
            return self._unavailable("The spool is full: too much is yet to be told", code="spool_full")
        request_id, key = new_id(), shown.sha256
        asked = _said(
            request_id=request_id, **shown.asked(), endpoint=endpoint, model=model, estimate=estimate,
            max_cost_usd=max_cost_usd, features=list(features), mode=mode, min_output_tokens=min_output_tokens,
            max_hold_usd=max_hold_usd, ttl_seconds=ttl_seconds, on_expiry=on_expiry,
        )  # fmt: skip
        if key is not None:
            self._spool.append(Asked(request_id, key))
        try:
            answer = await self._asking.within("/v1/meter/authorize", asked, self._ask_seconds)
        except Away as away:
            if away.may_have_happened:
                self._give_back(request_id, key)
            else:
                self._spool.append(Told(request_id))
            return self._away(away)
        except asyncio.CancelledError:
            self._give_back(request_id, key)
            raise
        sent = estimate.sent() if estimate is not None else None
        verdict = self._verdict(answer, lambda read: msgspec.convert(
            read | {"request_id": request_id, "sent": msgspec.to_builtins(sent)}, Allowed, strict=False
        ))  # fmt: skip
        if isinstance(verdict, Denied):
            self._spool.append(Told(request_id))
        return verdict

    async def verify(self, api_key: Shown | str | None, *, model: str | None = None) -> Verified | Denied:
        """Whose key is this, and may it spend? Nothing is held: what is allowed now may be refused then."""
        shown = Shown.of(api_key)
        if not shown:
            return _NO_KEY
        asked = _said(**shown.asked(), model=model)
        try:
            answer = await self._asking.within("/v1/meter/verify", asked, self._ask_seconds)
        except Away as away:
            return self._away(away)
        return self._verdict(answer, lambda read: msgspec.convert(read, Verified, strict=False))

    # --- while it is made ---

    def forwarded(self, call: Allowed, so_far: SoFar | None = None) -> None:
        """The upstream is called now. If this process dies before the call is settled, the next one settles it: at what
        `so_far` said last, or at what was sent.

        `so_far` is asked every `capture_seconds` what the call has used; what it has cost is told to Satmeter, which
        charges that where nobody settles, and keeps the hold from expiring meanwhile.
        """
        self._spool.append(Begun(call.request_id, call.hold_id, call.sent))
        self._calls[call.request_id] = _Call(call, so_far, call.sent)

    def known(self, call: Hold, done: Done) -> None:
        """What the call's settle will say whatever is used, as soon as it is known: who serves it, by which id, with which
        features. Whoever settles it if this process dies says it too."""
        made = self._calls.get(call.request_id)
        if made is not None:
            made.known = done
            self._spool.append(Known(call.request_id, call.hold_id, done))

    async def extend(
        self, call: Hold, *, ttl_seconds: int = 900, captured_usd: Decimal | None = None
    ) -> Extended | Refused | Unavailable:
        """Keep a hold for `ttl_seconds` from now at least. `captured_usd`, what the call has cost so far, can be released
        no more, and is charged where nobody settles."""
        asked = _said(hold_id=call.hold_id, ttl_seconds=ttl_seconds, captured_usd=captured_usd)
        try:
            answer = await self._asking.within("/v1/meter/extend", asked, self._ask_seconds)
        except Away as away:
            return self._away(away)
        if answer.status != 200:
            return Refused(answer.status, error_of(answer))
        return msgspec.convert(_EXACT.decode(answer.body), Extended)

    # --- after it ---

    def settle(self, call: Hold, done: Done, *, at_once: bool = False) -> "asyncio.Future[Outcome]":
        """Charge what was used. Returns at once: it is told in the background, until it is answered, however long that
        takes. Who wants to know the charge awaits what is returned: Charged, or Refused; with `at_once` it does not wait
        for others to go with. A call is settled once: what is said first counts."""
        self._calls.pop(call.request_id, None)
        return self._owe(settling(call, done), at_once=at_once)

    def release(self, call: Hold, reason: str = "not made") -> "asyncio.Future[Outcome]":
        """The call was not made, or the upstream refused it before it ran: give back what is held, in the background.

        A call of which something was captured has cost that, and is settled at it.
        """
        made = self._calls.pop(call.request_id, None)
        if made is not None and made.is_captured:
            return self.settle(call, unfinished(made.used, made.known))
        body = _said(hold_id=call.hold_id, reason=word(reason) or None)
        return self._owe(Owed(call.request_id, "release", msgspec.Raw(body)))

    async def charge(
        self,
        api_key: str,
        done: Done,
        *,
        model: str | None = None,
        endpoint: str | None = None,
        max_cost_usd: Decimal | None = None,
        request_id: str | None = None,
    ) -> Charged | Denied:
        """Authorize and settle in one, for work already done, of an API key: a JWT may be over by the time that it is told of
        the work, so its calls are authorized first. `request_id` is the caller's own name for this work where it
        has one that is never used twice: then it may be charged again after a crash, and is charged once.

        Unavailable where Satmeter gave no answer in time: it is told all the same, as soon as it can be.
        """
        asked = _said(
            request_id=request_id or new_id(), api_key_hash=key_hash(api_key), model=model, endpoint=endpoint,
            max_cost_usd=max_cost_usd, **done.body(),
        )  # fmt: skip
        outcome = await self._answer_of(Owed(msgspec.json.decode(asked)["request_id"], "charge", msgspec.Raw(asked)))
        if outcome is None:
            return self._unavailable("Billing cannot be reached; the charge is told as soon as it can be")
        if isinstance(outcome, Refused):
            return Denied.of(outcome.status, msgspec.Raw(msgspec.json.encode(outcome.error)), {})
        assert isinstance(outcome, Charged), "a charge is answered by nothing else"
        return outcome

    async def refund(
        self, charge_id: str, *, amount_usd: Decimal | None = None, reason: str | None = None
    ) -> Refunded | Refused | Unavailable:
        """Give money back of a charge, all of it where no amount is said; once, however often it is asked. Refused where
        there is no such charge, or another amount was given back before.

        Unavailable where Satmeter gave no answer in time: it is told all the same, as soon as it can be.
        """
        asked = _said(charge_id=charge_id, amount_usd=amount_usd, reason=word(reason or "") or None)
        outcome = await self._answer_of(Owed(f"refund {charge_id} {amount_usd}", "refund", msgspec.Raw(asked)))
        if outcome is None:
            return self._unavailable("Billing cannot be reached; the refund is told as soon as it can be")
        assert isinstance(outcome, Refunded | Refused), "a refund is answered by nothing else"
        return outcome

    # --- inside ---

    def _owe(self, owed: Owed, *, looks: int = 0, at_once: bool = False) -> "asyncio.Future[Outcome]":
        self._spool.append(owed)
        return self._telling.add(owed, self._spool.own, looks=looks, at_once=at_once)

    async def _answer_of(self, owed: Owed) -> Outcome:
        """What Satmeter says of it at once; None where it says nothing in time."""
        told = self._owe(owed, at_once=True)
        try:
            async with asyncio.timeout(self._ask_seconds):
                return await asyncio.shield(told)
        except TimeoutError:
            return None

    def _give_back(self, request_id: str, key: str | None) -> None:
        """What an authorize without an answer may have held, or may yet hold: it may still be on its way."""
        if key is None:
            return
        self._owe(giving_back(request_id, key, "the answer was lost"), looks=1)

    def _verdict(self, answer: Answer, allowed: Callable[[dict[str, Any]], _T]) -> _T | Denied:
        """What the answer says. One that is no verdict is about us: our token, or our question."""
        if answer.status != 200:
            code = error_of(answer).get("code")
            log.error("satmeter.question_refused status=%d code=%s", answer.status, code)
            return self._unavailable("Billing cannot be asked")
        read: dict[str, Any] = _EXACT.decode(answer.body)
        if read.get("decision") == "allow":
            return allowed(read)
        told = _DENIAL.decode(answer.body)
        return Denied.of(told.status, told.error, told.headers)

    def _away(self, away: Away) -> Unavailable:
        log.warning("satmeter.away reason=%s", away)
        return self._unavailable("Billing cannot be reached")

    def _unavailable(self, message: str, code: str = "billing_unavailable") -> Unavailable:
        again = f"{message}; try again in {self._retry_after_seconds} seconds"
        return Unavailable.now(again, code=code, retry_after_seconds=self._retry_after_seconds)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _adopt(self) -> None:
        """Take over what processes that are gone left behind."""
        for file in self._spool.of_the_gone():
            owed = outcomes(file)
            log.warning("satmeter.spool_taken_over file=%s owed=%d", file.path, len(owed))
            self._adopted.append(file)
            for each in owed:  # what was asked a moment before the end may still be on its way
                self._telling.add(each, file, looks=each.verb == "release")

    async def _keep_books(self) -> None:
        """Capture what streams have produced; look for what the gone left behind; let go of what is told."""
        ticks = 0
        while True:
            await asyncio.sleep(self._capture_seconds)
            ticks += 1
            try:
                await self._tick(ticks)
            except Exception:  # a defect of ours: the next tick is another try, and no call waits for this
                log.exception("satmeter.books_not_kept")

    async def _tick(self, ticks: int) -> None:
        await self._capture(is_told=ticks % _TOLD_EVERY == 0)
        for file in [file for file in self._adopted if not file.live]:
            file.close()
            self._adopted.remove(file)
        if ticks % _LOOKED_EVERY == 0:
            self._adopt()

    async def _capture(self, *, is_told: bool) -> None:
        grown = [call for call in list(self._calls.values()) if call.look()]
        for call in grown:
            assert call.used is not None
            self._spool.append(Captured(call.allowed.request_id, call.allowed.hold_id, call.used))
        if is_told:
            due = [call for call in list(self._calls.values()) if call.wants_telling()]
            for start in range(0, len(due), _EXTENDED_AT_ONCE):
                await asyncio.gather(*(self._tell_of(call) for call in due[start : start + _EXTENDED_AT_ONCE]))

    async def _tell_of(self, call: "_Call") -> None:
        used = call.used
        spent = call.allowed.spent_usd(used) if call.is_captured and used is not None else None
        found = await self.extend(call.allowed, captured_usd=spent)
        if not isinstance(found, Unavailable):  # one that is closed will not be open again
            call.told_at, call.told = time.monotonic(), used


class _Call:
    """A call that was forwarded and is not settled yet."""

    def __init__(self, allowed: Allowed, so_far: SoFar | None, used: Usage | None) -> None:
        self.allowed, self._so_far, self.used = allowed, so_far, used
        self.told: Usage | None = used
        self.known = Done()
        self.told_at = time.monotonic()
        self.is_captured = False

    def look(self) -> bool:
        """Whether it has used more than when it was looked at last."""
        used = None
        if self._so_far is not None:
            with contextlib.suppress(Exception):  # a proxy's fault: its call is settled as it said before
                used = self._so_far()
        if used is None or used == self.used:
            return False
        self.used, self.is_captured = used, True
        return True

    def wants_telling(self) -> bool:
        return self.used != self.told or time.monotonic() - self.told_at > _HOLD_KEPT_SECONDS


_TOLD_EVERY: Final = 5
_LOOKED_EVERY: Final = 30
_EXTENDED_AT_ONCE: Final = 8
_HOLD_KEPT_SECONDS: Final = 300.0
_EXACT: Final = msgspec.json.Decoder(float_hook=Decimal)


class _Denial(msgspec.Struct):
    status: int
    error: msgspec.Raw
    headers: dict[str, str] = msgspec.field(default_factory=dict)


_DENIAL: Final = msgspec.json.Decoder(_Denial)
_NO_KEY: Final = Denied.of(401, msgspec.Raw(
    b'{"message":"No API key was sent","type":"authentication_error","code":"invalid_api_key","param":null}'
), {})  # fmt: skip


def new_id() -> str:
    """A request_id: never a client's, never used twice."""
    return uuid.uuid4().hex


def _said(**told: Any) -> bytes:
    said = {name: amount(value) if isinstance(value, Decimal) else value for name, value in told.items()}
    return msgspec.json.encode({name: value for name, value in said.items() if value is not None})
