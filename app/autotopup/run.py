"""Driving attempts: each step is claimed, done, and written down, so that whoever comes after a crash goes on from there.

No step holds a transaction while it talks to the world, and a request to pay is committed before it is sent: what a
crash leaves behind as SENT is looked into, never sent again. What was paid is decided by the payment backend alone.
"""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.autotopup import attempts, connect, rules
from app.autotopup.attempts import AttemptRef, TakenOver
from app.autotopup.rules import State
from app.autotopup.wallet import Connection, LightningInvoice, PayReply, WalletError, Wallets
from app.kernel.db import Database, Row, row
from app.kernel.errors import DatabaseUnavailable, PaymentBackendUnavailable, RateLimitExceeded
from app.kernel.logs import log
from app.kernel.security import Caller, Kind, Sealer, UnsealError
from app.topups.create import Receipts, Wish, create_topup
from app.topups.credit import TopupRef, credit_if_paid
from app.topups.finding import note_finding
from app.topups.gateway import GatewayError, Gateways
from app.topups.methods import METHODS

LIGHTNING: Final = METHODS["btc-lightning"]
_FIRST_LOOK_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 2.0
"""How often to look whether the payment that a wallet was asked for has been credited, while its answer is waited for."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What `begin` did: the attempt, or when it is worth asking again (None: when something changes)."""

    ref: AttemptRef | None = None
    again_at: datetime | None = None
    is_enough: bool = False
    """Whether nothing was done because the balance is not low: the next charge may change that at any moment."""


class AutoTopup:
    """The verbs. `network` is the prefix that invoices must have; `is_on` False is the operator's kill switch."""

    def __init__(
        self,
        db: Database,
        gateways: Gateways,
        wallets: Wallets,
        sealer: Sealer,
        *,
        network: str,
        is_on: bool,
        receipts: Receipts | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._db, self._gateways, self._wallets, self._sealer = db, gateways, wallets, sealer
        self._network, self.is_on, self._receipts, self._now = network, is_on, receipts, clock

    async def begin(self, account_id: uuid.UUID) -> Begun:
        """Open an attempt if this account should be topped up now. Safe to call at any time, from anywhere."""
        if not self.is_on:
            return Begun()
        return await self._db.transaction(lambda session: self._begin(session, account_id))

    async def _begin(self, session: AsyncSession, account_id: uuid.UUID) -> Begun:
        now = self._now()
        connection = await connect.lock(session, account_id)
        if connection is None:
            return Begun()
        standing = await attempts.standing(session, account_id, now)
        if not rules.is_wanted(connection, standing):
            return Begun(is_enough=standing.balance_nusd >= connection["threshold_nusd"])
        at = rules.earliest(connection, standing, now)
        if at > now:
            await connect.wait(session, connection, at)
            return Begun(again_at=at)
        return Begun(await attempts.open_attempt(session, connection, now))

    async def advance(self, ref: AttemptRef) -> Row | None:
        """Take an open attempt one step on; returns it after that, None if another driver has it or it is closed.

        Whatever breaks leaves the attempt as it was written last; when our claim has run out, the next driver
        goes on from there.
        """
        attempt = await self._db.transaction(lambda session: attempts.claim(session, ref, self._now()))
        if attempt is None:
            return None
        step = {
            State.CREATED: self._ask_for_invoice,
            State.INVOICED: self._ask_for_payment,
            State.SENT: self._find_answer_lost,
            State.UNKNOWN: self.reconcile,
            State.PAID_REPORTED: self.reconcile,
        }[State(attempt["state"])]
        try:
            return await step(attempt)
        except TakenOver:
            return None

    async def drive(self, ref: AttemptRef) -> bool:
        """Take an attempt on until it has to wait for something; the clock comes back to it. Whether it settled now."""
        while (attempt := await self.advance(ref)) is not None:
            if attempt["next_at"] is None or attempt["next_at"] > self._now():
                return bool(attempt["state"] == State.SETTLED)
        return False

    async def due(self) -> list[AttemptRef]:
        """Attempts to be driven on now."""
        return await attempts.due(self._db, self._now())

    async def low(self) -> list[uuid.UUID]:
        """Accounts to begin an attempt for, should no charge have told."""
        if not self.is_on:
            return []
        return await connect.low_accounts(self._db, self._now())

    async def sweep(self) -> None:
        """What no driver comes back to: payments after an attempt was closed, and wallets forgiven for a top-up."""
        late = await self._db.transaction(lambda session: attempts.paid_late(session, self._now()))
        forgivable = await self._db.transaction(connect.resumable)
        works = [partial(self._settle_late, ref=ref) for ref in late]
        works += [partial(self._resume, account_id=account_id) for account_id in forgivable]
        defects: list[Exception] = []
        for work in works:
            try:
                await self._db.transaction(work)
            except DatabaseUnavailable:
                raise  # the others would fare no better; all of them come again
            except Exception as error:  # noqa: BLE001 - a defect in one must not keep the others waiting; raised below
                defects.append(error)
        if defects:
            raise ExceptionGroup("auto top-ups that could not be swept", defects)

    async def _settle_late(self, session: AsyncSession, ref: AttemptRef) -> None:
        """Settle it and forgive its wallet in one: a crash between the two would leave the wallet paused for ever."""
        connection = await connect.lock(session, ref.account_id)
        attempt = await attempts.settle_late(session, ref)
        if attempt is None:
            return
        if connection is not None and connection["id"] == attempt["connection_id"]:
            await connect.resume(session, connection)
        log.info("autotopup.settled_late", account_id=str(ref.account_id), topup_id=str(attempt["topup_id"]))

    async def _resume(self, session: AsyncSession, account_id: uuid.UUID) -> None:
        connection = await connect.lock(session, account_id)
        if connection is not None and await connect.is_resumable(session, connection):
            await connect.resume(session, connection)

    # --- CREATED: the invoice ---

    async def _ask_for_invoice(self, attempt: Row) -> Row:
        obstacle = await self._db.transaction(lambda session: self._obstacle(session, attempt))
        if obstacle is None and LIGHTNING.id not in self._gateways.methods:
            obstacle = "backend"
        if obstacle is not None:
            return await self._give_up(attempt, obstacle)
        try:
            topup = await self._topup_for(attempt)
        except (PaymentBackendUnavailable, RateLimitExceeded):  # the latter: its owner makes many at this moment
            if self._now() - attempt["created_at"] >= rules.INVOICE_WITHIN:
                return await self._give_up(attempt, "backend")
            return await self._wait(attempt)
        try:
            invoice = self._wallets.read_invoice(topup["destination"] or "")
        except ValueError:
            return await self._refuse_invoice(attempt, "unreadable", "it is no BOLT11 that can be read")
        due_msat = topup["total_coin_units"] or 0
        fault = rules.invoice_fault(invoice, due_msat, self._network, self._now())
        if fault is not None:
            found = f"{invoice.network}, {invoice.amount_msat} msat; expected {self._network}, {due_msat} msat"
            return await self._refuse_invoice(attempt, fault, found)
        return await self._take_invoice(attempt, topup, invoice)

    async def _topup_for(self, attempt: Row) -> Row:
        """The attempt's top-up, ready to be paid: made now, or found again. Raises PaymentBackendUnavailable."""

        async def finish(_: AsyncSession, topup: Row) -> Row:
            return topup

        caller = Caller(Kind.CREDIT_ID, attempt["account_id"])
        wish = Wish(LIGHTNING, "USD", attempt["amount_nusd"])
        gateway = self._gateways.of_method(LIGHTNING.id)
        return await create_topup(self._db, gateway, caller, wish, attempt["topup_id"], finish, receipts=self._receipts)

    async def _refuse_invoice(self, attempt: Row, fault: str, found: str) -> Row:
        """An invoice that is not what we asked for is ours to look into, and no wallet is asked to pay it."""
        if fault in rules.WRONG_INVOICE:
            log.error(
                "autotopup.wrong_invoice", account_id=str(attempt["account_id"]), topup_id=str(attempt["topup_id"]),
                code=fault, error=found,
            )  # fmt: skip
        return await self._give_up(attempt, fault)

    async def _take_invoice(self, attempt: Row, topup: Row, invoice: LightningInvoice) -> Row:
        try:
            return await self._write(
                attempt, State.INVOICED, bolt11=topup["destination"], payment_hash=invoice.payment_hash,
                invoice_expires_at=invoice.expires_at, next_at=self._now(), looks=0,
            )  # fmt: skip
        except IntegrityError as error:  # an earlier attempt had this payment hash: its payment would be taken for ours
            if "nwc_attempt_payment_once" not in str(error.orig):
                raise
            return await self._refuse_invoice(attempt, "used", "its payment hash is an earlier attempt's")

    # --- INVOICED: the request ---

    async def _ask_for_payment(self, attempt: Row) -> Row:
        if attempt["invoice_expires_at"] - self._now() < rules.MIN_INVOICE_LEFT:
            return await self._give_up(attempt, "unreached" if attempt["reason"] == "unreached" else "too_late")
        if attempt["sends"] > 0 and (ended := await self._before_second_send(attempt)) is not None:
            return ended
        found = await self._db.transaction(lambda session: connect.find(session, attempt["account_id"]))
        if found is None:
            return await self._give_up(attempt, "disconnected")
        try:
            connection = connect.opened(self._sealer, found)
        except UnsealError:
            log.error("autotopup.secret_unreadable", account_id=str(attempt["account_id"]))
            return await self._give_up(attempt, "disconnected", pause="unreadable")
        return await self._send(attempt, connection)

    async def _before_second_send(self, attempt: Row) -> Row | None:
        """A second request for one invoice: only where the first was surely refused, and the backend agrees.

        Returns the attempt if it ended or has to wait, None if it may be sent.
        """
        try:
            await self._ask_backend(attempt)
        except GatewayError:
            return await self._wait(attempt)
        if attempt["code"] != "UNSUPPORTED_ENCRYPTION":
            return None
        return await self._choose_encryption_anew(attempt)

    async def _choose_encryption_anew(self, attempt: Row) -> Row | None:
        """Ask the wallet what it speaks now; if that is nothing else, sending again is no use."""
        found = await self._db.transaction(lambda session: connect.find(session, attempt["account_id"]))
        if found is None:
            return await self._give_up(attempt, "disconnected")
        try:
            probe = await self._wallets.probe(connect.opened(self._sealer, found).uri)
        except (WalletError, UnsealError):
            return await self._give_up(attempt, "refused")
        if probe.encryption.value == found["encryption"]:
            return await self._give_up(attempt, "refused")
        await self._db.transaction(lambda session: connect.learn_encryption(session, found, probe.encryption))
        return None

    async def _send(self, attempt: Row, connection: Connection) -> Row:
        """Write down the signed request, then send it: once it is committed as SENT, it counts as sent, whatever comes."""
        request = self._wallets.sign_payment(connection, attempt["bolt11"], attempt["invoice_expires_at"])

        async def work(session: AsyncSession) -> Row | str:
            obstacle = await self._obstacle(session, attempt) or await _topup_obstacle(session, attempt)
            if obstacle is not None:
                return obstacle
            now = self._now()
            return await attempts.move(
                session, attempt, State.SENT, now, event_id=request.event_id, sends=attempt["sends"] + 1, sent_at=now,
                next_at=now + rules.LEASE, reason=None, looks=0,
            )  # fmt: skip

        sent = await self._db.transaction(work)
        if isinstance(sent, str):
            return await self._give_up(attempt, sent)
        paying = asyncio.create_task(self._wallets.pay(connection, request, attempt["payment_hash"]))
        is_over = asyncio.Event()
        credited = asyncio.create_task(self._until_credited(attempt, is_over))
        try:
            await asyncio.wait((paying, credited), return_when=asyncio.FIRST_COMPLETED)
            if paying.done():
                return await self._hear(sent, paying.result())
            return await self._settle(sent)
        finally:
            is_over.set()  # not cancelled: that could come in the middle of a transaction
            paying.cancel()
            await asyncio.gather(paying, credited, return_exceptions=True)

    async def _until_credited(self, attempt: Row, is_over: asyncio.Event) -> None:
        """Returns when the top-up is credited, whoever asked the backend: then no answer is worth waiting for."""
        account_id, topup_id, seconds = attempt["account_id"], attempt["topup_id"], _FIRST_LOOK_SECONDS
        while not is_over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), seconds)
                return
            seconds = min(seconds * 1.5, _LOOK_SECONDS)
            with suppress(DatabaseUnavailable):
                topup = await self._db.transaction(lambda session: _topup(session, account_id, topup_id))
                if topup is not None and topup["credited_nusd"] > 0:
                    return

    async def _obstacle(self, session: AsyncSession, attempt: Row) -> str | None:
        """Why the wallet must not be asked now, one of REASONS. Locks the connection: nobody removes it before we commit."""
        connection = await connect.lock(session, attempt["account_id"])
        if connection is None or connection["id"] != attempt["connection_id"]:
            return "disconnected"
        if connection["pause"] is not None:
            return "paused"
        if not self.is_on:
            return "off"
        account = await row(session, "SELECT posted_nusd, status FROM account WHERE id = :id", id=attempt["account_id"])
        assert account is not None
        if account["status"] != "active":
            return "frozen"
        return "not_needed" if account["posted_nusd"] >= connection["threshold_nusd"] else None

    # --- SENT: the reply ---

    async def _hear(self, attempt: Row, reply: PayReply) -> Row:
        now = self._now()
        meaning = rules.meaning_of(reply, attempt["sends"])

        async def work(session: AsyncSession) -> Row:
            connection = await self._own_connection(session, attempt)
            moved = await attempts.move(
                session, attempt, meaning.state, now, code=meaning.code, reason=meaning.reason, is_proven=reply.is_proven,
                answered_at=now if reply.was_answered else attempt["answered_at"], next_at=now + meaning.again_in,
                sends=attempt["sends"] if meaning.was_sent else attempt["sends"] - 1,
            )  # fmt: skip
            if connection is not None and reply.was_answered:
                await connect.note_answer(session, connection)
            if connection is not None and meaning.state is State.REJECTED:
                await connect.note_refusal(session, connection, meaning.pause, now)
            elif connection is not None and meaning.pause is not None:
                await connect.stop(session, connection, meaning.pause, now)
            return moved

        moved = await self._db.transaction(work)
        log.info("autotopup.answered", account_id=str(attempt["account_id"]), state=moved["state"], code=meaning.code)
        return moved

    async def _find_answer_lost(self, attempt: Row) -> Row:
        """Its driver is gone, and with it the answer, if there was one. The request may have been sent: never again."""
        return await self._write(attempt, State.UNKNOWN, next_at=self._now())

    # --- UNKNOWN and PAID_REPORTED: what became of it ---

    async def reconcile(self, attempt: Row) -> Row:
        """Ask the backend, which decides; then the wallet, which can only prove; close it when nothing can come any more."""
        try:
            topup = await self._ask_backend(attempt)
        except GatewayError:
            return await self._wait(attempt)
        if topup["credited_nusd"] > 0:
            return await self._settle(attempt)
        if rules.is_over(topup["status"], attempt["invoice_expires_at"], self._now()):
            return await self._expire(attempt)
        if attempt["state"] == State.UNKNOWN and await self._wallet_proves(attempt):
            return await self._write(attempt, State.PAID_REPORTED, is_proven=True, next_at=self._now(), looks=0)
        return await self._wait(attempt)

    async def _ask_backend(self, attempt: Row) -> Row:
        """Credit what was paid, and read the top-up after it. Raises GatewayError."""
        account_id, topup_id = attempt["account_id"], attempt["topup_id"]
        topup = await self._db.transaction(lambda session: _topup(session, account_id, topup_id))
        if topup is None:
            raise AssertionError("an attempt that has an invoice has its top-up")
        gateway = self._gateways.named(topup["backend"])
        if gateway is not None and topup["credited_nusd"] == 0:
            await credit_if_paid(self._db, gateway, TopupRef(account_id, topup_id))
            topup = await self._db.transaction(lambda session: _topup(session, account_id, topup_id))
        assert topup is not None
        return topup

    async def _wallet_proves(self, attempt: Row) -> bool:
        """Whether the wallet shows the preimage; what else it says, also that there was no payment, proves nothing."""
        found = await self._db.transaction(lambda session: connect.find(session, attempt["account_id"]))
        if found is None or found["id"] != attempt["connection_id"] or not found["can_look_up"]:
            return False
        try:
            connection = connect.opened(self._sealer, found)
        except UnsealError:
            return False
        reply = await self._wallets.look_up(connection, attempt["payment_hash"])
        if reply.was_answered:
            await self._db.transaction(lambda session: connect.note_answer(session, found))
        return reply.is_proven

    async def _settle(self, attempt: Row) -> Row:
        async def work(session: AsyncSession) -> Row:
            await self._forgive(session, attempt)
            return await attempts.move(session, attempt, State.SETTLED, self._now(), reason=None)

        settled = await self._db.transaction(work)
        log.info(
            "autotopup.settled", account_id=str(attempt["account_id"]), topup_id=str(attempt["topup_id"]),
            amount_nusd=attempt["amount_nusd"],
        )  # fmt: skip
        return settled

    async def _forgive(self, session: AsyncSession, attempt: Row) -> None:
        """Its wallet has paid: nothing counts against it any more."""
        connection = await self._own_connection(session, attempt)
        if connection is not None:
            await connect.resume(session, connection)

    async def _expire(self, attempt: Row) -> Row:
        """The invoice was not paid and cannot be any more. A payment that the wallet proved is for a person to find."""
        now = self._now()

        async def work(session: AsyncSession) -> Row:
            connection = await self._own_connection(session, attempt)
            if attempt["is_proven"]:
                await _flag(session, attempt)
            moved = await attempts.move(session, attempt, State.EXPIRED, now, reason=_why_unpaid(attempt))
            if connection is None:
                return moved
            if attempt["is_proven"]:
                await connect.stop(session, connection, "unconfirmed", now)
            elif attempt["answered_at"] is not None:
                await connect.note_refusal(session, connection, None, now)
            elif attempt["reason"] == "not_taken":  # the wallet need not have heard of it
                await connect.wait(session, connection, now + rules.BACK_OFF[0])
            else:
                await connect.note_silence(session, connection, attempt["sent_at"], now)
            return moved

        return await self._db.transaction(work)

    # --- every state ---

    async def _give_up(self, attempt: Row, reason: str, pause: str | None = None) -> Row:
        """Close an attempt whose wallet was not asked, or surely refused: nobody will pay its invoice but by hand."""
        now = self._now()
        to = State.REJECTED if attempt["sends"] > 0 else State.EXPIRED

        async def work(session: AsyncSession) -> Row:
            connection = await self._own_connection(session, attempt)
            moved = await attempts.move(session, attempt, to, now, reason=reason)
            if connection is None:
                return moved
            if pause is not None:
                await connect.stop(session, connection, pause, now)
            elif to is State.REJECTED and reason in ("refused", "too_late", "unreached"):
                await connect.note_refusal(session, connection, None, now)
            elif reason == "unreached":
                await connect.note_silence(session, connection, attempt["sent_at"] or attempt["created_at"], now)
            elif reason == "backend" or reason in rules.WRONG_INVOICE:
                await connect.wait(session, connection, now + rules.OUR_TROUBLE)
            return moved

        return await self._db.transaction(work)

    async def _wait(self, attempt: Row) -> Row:
        """Nothing new: look again after a while, each time a longer one."""
        again_at = rules.look_again_at(attempt["looks"], attempt["invoice_expires_at"], self._now())
        return await self._write(attempt, State(attempt["state"]), next_at=again_at, looks=attempt["looks"] + 1)

    async def _write(self, attempt: Row, to: State, **changes: object) -> Row:
        return await self._db.transaction(lambda session: attempts.move(session, attempt, to, self._now(), **changes))

    async def _own_connection(self, session: AsyncSession, attempt: Row) -> Row | None:
        """The connection that this attempt was made with, locked; None if it was replaced or removed since."""
        connection = await connect.lock(session, attempt["account_id"])
        return connection if connection is not None and connection["id"] == attempt["connection_id"] else None


def _why_unpaid(attempt: Row) -> str:
    if attempt["state"] == State.PAID_REPORTED:
        return "unconfirmed"
    if attempt["answered_at"] is not None:
        return "unpaid"
    return attempt["reason"] or "silence"


async def _topup(session: AsyncSession, account_id: uuid.UUID, topup_id: uuid.UUID) -> Row | None:
    return await row(
        session, "SELECT * FROM topup WHERE account_id = :account_id AND id = :id", account_id=account_id, id=topup_id
    )


async def _topup_obstacle(session: AsyncSession, attempt: Row) -> str | None:
    """An invoice that somebody has paid by hand, or that was closed, is not sent to a wallet as well."""
    topup = await _topup(session, attempt["account_id"], attempt["topup_id"])
    assert topup is not None
    return None if topup["status"] == "New" and topup["credited_nusd"] == 0 else "taken"


async def _flag(session: AsyncSession, attempt: Row) -> None:
    """Show the top-up to a person: its payer can prove a payment that the backend has not seen."""
    review = "the wallet of an auto top-up proved a payment that the backend has not seen"
    await note_finding(session, attempt["account_id"], attempt["topup_id"], review, gives_way=True)
    log.error("topup.needs_review", topup_id=str(attempt["topup_id"]), error=review)
