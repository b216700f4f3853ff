"""How HTTP asks for auto top-ups: connect a wallet, look at it, take it away; with the credit id."""

from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from litestar import Controller, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.autotopup import connect as connections
from app.autotopup.attempts import list_attempts, standing
from app.autotopup.connect import Wish
from app.autotopup.rules import PAUSES, REASONS, next_attempt_at
from app.autotopup.run import LIGHTNING
from app.autotopup.wallet import Wallets, hosts
from app.autotopup.watch import Watcher
from app.kernel.db import Database, Row
from app.kernel.errors import AmountOutOfRange, InvalidField
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, is_given, parse_usd, usd, usd_or_null, usd_text
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.ratelimit import count_or_refuse
from app.kernel.security import Caller
from app.kernel.settings import Settings
from app.topups.gateway import Gateways
from app.topups.methods import method_named

CONNECTS_PER_HOUR = 60
MIN_THRESHOLD_NUSD = 5_000_000_000
DEFAULT_NUSD = 10_000_000_000
SWITCHED_OFF = "The operator has switched auto top-ups off."
_CANNOT_LOOK_UP = (
    "The wallet does not offer lookup_invoice over this connection: when an answer of its is lost, it cannot be asked"
    " whether it paid. Connect again with one that may look up invoices."
)

AttemptState = Literal["created", "invoiced", "sent", "paid_reported", "unknown", "rejected", "settled", "expired"]


class ConnectRequest(msgspec.Struct, frozen=True):
    """A wallet, when to top up from it, and by how much. `nwc_url` holds a secret and is never shown again."""

    nwc_url: Annotated[str, msgspec.Meta(min_length=1, max_length=4000)]
    threshold_usd: JsonNumber = msgspec.Raw(b"")
    topup_amount_usd: JsonNumber = msgspec.Raw(b"")
    max_per_day_usd: JsonNumber = msgspec.Raw(b"")


class AttemptView(msgspec.Struct, frozen=True):
    """One attempt to be paid by the wallet. `credited_usd` has the bonus in it; the money itself is in `/topups`."""

    id: UUID
    state: AttemptState
    amount_usd: JsonNumber
    credited_usd: JsonNumber
    invoice_id: str | None
    code: str | None
    reason: str | None
    created_at: datetime
    closed_at: datetime | None

    @classmethod
    def of(cls, attempt: Row) -> "AttemptView":
        same = {name: attempt[name] for name in ("id", "state", "invoice_id", "code", "created_at", "closed_at")}
        return cls(
            **same,
            amount_usd=usd(attempt["amount_nusd"]),
            credited_usd=usd(attempt["credited_nusd"]),
            reason=REASONS.get(attempt["reason"] or ""),
        )


class ConnectionView(msgspec.Struct, frozen=True):
    """A connected wallet as its owner sees it: of the URL only what is no secret."""

    enabled: bool
    state: Literal["active", "paused"]
    pause_reason: str | None
    threshold_usd: JsonNumber
    topup_amount_usd: JsonNumber
    max_per_day_usd: JsonNumber
    wallet_pubkey: str
    relays: list[str]
    encryption: str
    lud16: str | None
    warnings: list[str]
    next_attempt_at: datetime | None
    last_attempt: AttemptView | None
    created_at: datetime

    @classmethod
    def of(cls, connection: Row, last: Row | None, next_at: datetime | None, *, is_on: bool) -> "ConnectionView":
        enabled = is_on and connection["pause"] is None
        return cls(
            enabled=enabled,
            state="active" if enabled else "paused",
            pause_reason=PAUSES.get(connection["pause"] or "") or (None if is_on else SWITCHED_OFF),
            threshold_usd=usd(connection["threshold_nusd"]),
            topup_amount_usd=usd(connection["topup_amount_nusd"]),
            max_per_day_usd=usd_or_null(connection["max_per_day_nusd"]),
            wallet_pubkey=connection["wallet_pubkey"],
            relays=hosts(connection["relays"]),
            encryption=connection["encryption"],
            lud16=connection["lud16"],
            warnings=[] if connection["can_look_up"] else [_CANNOT_LOOK_UP],
            next_attempt_at=next_at if enabled else None,
            last_attempt=AttemptView.of(last) if last else None,
            created_at=connection["created_at"],
        )


class ConnectionAnswer(msgspec.Struct, frozen=True):
    data: ConnectionView | None
    status: str = "success"


class AttemptsPage(msgspec.Struct, frozen=True):
    data: list[AttemptView]
    next_cursor: str | None
    status: str = "success"


class Disconnected(msgspec.Struct, frozen=True):
    status: str = "success"
    message: str = "Wallet disconnected; auto top-up is off"


class AutoTopupController(Controller):
    """Top up by itself from the customer's own Lightning wallet (Nostr Wallet Connect). All of it needs `x-credit-id`."""

    path = "/nwc-auto-topup"
    tags = ("Auto top-up",)

    @post("/connect", status_code=200, summary="Connect a wallet")
    async def connect(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        wallets: NamedDependency[Wallets],
        gateways: NamedDependency[Gateways],
        watcher: NamedDependency[Watcher],
        settings: NamedDependency[Settings],
        once: NamedDependency[Once],
        data: JSONBody[ConnectRequest],
    ) -> ConnectionAnswer:
        """The wallet is asked what it is first. Takes the place of one that was connected before.

        Use a connection of its own with a budget, that may pay invoices and look them up, and nothing more.
        """
        method_named(LIGHTNING.id, gateways.methods)
        wish, uri = wish_of(data), wallets.parse(data.nwc_url)
        if (earlier := await once.claim(ConnectionAnswer)) is not None:
            return earlier

        async def store(session: AsyncSession) -> ConnectionAnswer:
            made = await connections.connect(
                session, settings.sealer, owner.account_id, uri, found, wish, datetime.now(UTC)
            )
            answer = ConnectionAnswer(await _view(session, made, settings))
            await once.save(session, answer)
            return answer

        try:
            await count_or_refuse(db, f"nwc/{owner.account_id}", CONNECTS_PER_HOUR)
            with connections.alone(owner.account_id):
                found = await connections.probe(wallets, uri)
            answer = await db.transaction(store)
        except BaseException:
            await once.abandon()
            raise
        watcher.forget(owner.account_id)
        watcher.notice(owner.account_id)  # the balance may be low already
        return answer

    @get("/", summary="Show the connected wallet")
    async def read_connection(
        self, owner: NamedDependency[Caller], db: NamedDependency[Database], settings: NamedDependency[Settings]
    ) -> ConnectionAnswer:
        """`data` is null when no wallet is connected; `pause_reason` says what would make it go on.

        `next_attempt_at` is when the next attempt may begin, should the balance be below the threshold then: a minute
        after one that was not paid, later after refusals and where a cap of the day is reached. Null: as soon as it is.
        """

        async def work(session: AsyncSession) -> ConnectionAnswer:
            connection = await connections.find(session, owner.account_id)
            return ConnectionAnswer(await _view(session, connection, settings) if connection else None)

        return await db.transaction(work)

    @delete("/connection", status_code=200, summary="Disconnect the wallet")
    async def disconnect(self, owner: NamedDependency[Caller], db: NamedDependency[Database]) -> Disconnected:
        """The wallet's secret is forgotten, and it is asked for nothing any more. What it was asked to pay is still credited."""
        await db.transaction(lambda session: connections.disconnect(session, owner.account_id))
        return Disconnected()

    @get("/attempts", summary="List what was tried")
    async def list_attempts(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> AttemptsPage:
        """Every attempt, newest first, with the wallet's error code and why it ended."""
        size, after = page_size(limit), from_cursor(cursor, tuple[datetime, UUID])
        found = await db.transaction(lambda session: list_attempts(session, owner.account_id, size + 1, after))
        last = found[size - 1] if len(found) > size else None
        return AttemptsPage(
            [AttemptView.of(attempt) for attempt in found[:size]],
            to_cursor(last["created_at"], last["id"]) if last else None,
        )


async def _view(session: AsyncSession, connection: Row, settings: Settings) -> ConnectionView:
    account_id, now = connection["account_id"], datetime.now(UTC)
    last = await list_attempts(session, account_id, 1, None)
    next_at = next_attempt_at(connection, await standing(session, account_id, now), now)
    return ConnectionView.of(connection, last[0] if last else None, next_at, is_on=settings.nwc_auto_topup)


def wish_of(data: ConnectRequest) -> Wish:
    """Raises InvalidField, and AmountOutOfRange with what a Lightning top-up may be."""
    threshold_nusd = _usd(data.threshold_usd, "threshold_usd", DEFAULT_NUSD)
    if threshold_nusd < MIN_THRESHOLD_NUSD:
        raise InvalidField("threshold_usd must be at least 5", param="threshold_usd")
    amount_nusd = _usd(data.topup_amount_usd, "topup_amount_usd", DEFAULT_NUSD)
    limits = LIGHTNING.limits["USD"]
    if not limits.least <= amount_nusd <= limits.most:
        raise AmountOutOfRange(
            f"A Lightning top-up takes {usd_text(limits.least)} to {usd_text(limits.most)} USD, got {usd_text(amount_nusd)}",
            param="topup_amount_usd",
            metadata={"min": usd(limits.least), "max": usd(limits.most), "currency": "USD"},
        )
    cap_nusd = parse_usd(data.max_per_day_usd, "max_per_day_usd") if is_given(data.max_per_day_usd) else None
    if cap_nusd is not None and cap_nusd < amount_nusd:
        raise InvalidField("max_per_day_usd must allow one top-up at least", param="max_per_day_usd")
    return Wish(threshold_nusd, amount_nusd, cap_nusd)


def _usd(raw: JsonNumber, field: str, default_nusd: int) -> int:
    return parse_usd(raw, field) if is_given(raw) else default_nusd
