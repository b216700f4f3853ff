"""How operators ask: the top-ups that wait for a person. Every act is written to the audit log with it."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from litestar import Controller, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.acts import write_act
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField, InvoiceNotFound, PaymentBackendUnavailable
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, is_given, parse_usd, usd
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.reading import uuid_in
from app.kernel.security import Admin
from app.kernel.settings import Settings
from app.topups.create import read_topup
from app.topups.credit import credit_if_paid
from app.topups.gateway import GatewayError, Gateways
from app.topups.review import ref_of, resolve, waiting

Reason = Annotated[str, msgspec.Meta(min_length=3, max_length=500, pattern=r"^[^\x00-\x1f\x7f]+\Z")]


class ReviewedTopup(msgspec.Struct, frozen=True):
    """A top-up as an operator sees it."""

    id: UUID
    account_id: UUID
    invoice_id: str | None
    backend: str
    method: str
    status: str
    additional_status: str
    credited_usd: JsonNumber
    bonus_usd: JsonNumber
    review: str | None
    finding_id: UUID | None
    created_at: datetime

    @classmethod
    def of(cls, topup: Row) -> "ReviewedTopup":
        names = (
            "id",
            "account_id",
            "invoice_id",
            "backend",
            "method",
            "status",
            "additional_status",
            "review",
            "finding_id",
            "created_at",
        )
        same = {name: topup[name] for name in names}
        return cls(**same, credited_usd=usd(topup["credited_nusd"]), bonus_usd=usd(topup["bonus_nusd"]))


class ReviewPage(msgspec.Struct, frozen=True):
    data: list[ReviewedTopup]
    next_cursor: str | None


class Resolution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`dismiss`: what was credited is right. `credit` or `debit`: move `amount_usd` as well, as an adjustment.

    With `finding_id` nothing happens unless that is the finding that waits: there may be a newer one by now.
    """

    action: Literal["dismiss", "credit", "debit"]
    reason: Reason
    amount_usd: JsonNumber = msgspec.Raw(b"")
    finding_id: UUID | None = None


class AdminTopupsController(Controller):
    """The review queue. Needs an admin token."""

    path = "/admin/topups"
    tags = ("Admin",)

    @get("/", summary="Top-ups that wait for a person")
    async def list_waiting(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> ReviewPage:
        """Marked by hand, invalid, settled short, or not what was asked for; oldest first."""
        size, after = page_size(limit), from_cursor(cursor, tuple[datetime, UUID])
        found = await db.transaction(lambda session: waiting(session, size + 1, after))
        last = found[size - 1] if len(found) > size else None
        return ReviewPage(
            [ReviewedTopup.of(topup) for topup in found[:size]],
            to_cursor(last["created_at"], last["id"]) if last else None,
        )

    @post("/{topup_id:str}/reconcile", status_code=200, summary="Ask the backend now")
    async def reconcile(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        gateways: NamedDependency[Gateways],
        settings: NamedDependency[Settings],
        topup_id: FromPath[str],
    ) -> ReviewedTopup:
        """Credits what was paid and is not credited yet."""
        ref = await db.transaction(lambda session: ref_of(session, _id(topup_id)))
        topup = await db.transaction(lambda session: read_topup(session, ref.account_id, ref.topup_id))
        gateway = gateways.named(topup["backend"])
        if gateway is None:
            raise PaymentBackendUnavailable(
                f"No backend named {topup['backend']} is configured", retry_after_seconds=60
            )
        try:
            await credit_if_paid(db, gateway, ref)
        except GatewayError as error:
            raise PaymentBackendUnavailable(retry_after_seconds=5) from error

        async def work(session: AsyncSession) -> Row:
            await write_act(session, settings.pepper, admin, "topup.reconcile", f"{ref.account_id}/{ref.topup_id}")
            return await read_topup(session, ref.account_id, ref.topup_id)

        return ReviewedTopup.of(await db.transaction(work))

    @post("/{topup_id:str}/resolve", status_code=200, summary="Decide a review")
    async def resolve(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        topup_id: FromPath[str],
        data: JSONBody[Resolution],
    ) -> ReviewedTopup:
        """Takes it off the queue. The same finding does not come back."""
        adjust_nusd = _adjustment(data)
        ref = await db.transaction(lambda session: ref_of(session, _id(topup_id)))

        async def effect(session: AsyncSession) -> ReviewedTopup:
            resolved = await resolve(session, ref, adjust_nusd, data.finding_id)
            subject = f"{ref.account_id}/{ref.topup_id}/{resolved['finding_id']}"
            await write_act(session, settings.pepper, admin, f"topup.{data.action}", subject, data.reason, adjust_nusd)
            return ReviewedTopup.of(resolved)

        return await once.do(ReviewedTopup, effect)


def _adjustment(data: Resolution) -> int:
    if data.action == "dismiss":
        if is_given(data.amount_usd):
            raise InvalidField("amount_usd goes with credit or debit", param="amount_usd")
        return 0
    amount_nusd = parse_usd(data.amount_usd, "amount_usd")
    if amount_nusd == 0:
        raise InvalidField("amount_usd must be more than 0", param="amount_usd")
    return amount_nusd if data.action == "credit" else -amount_nusd


def _id(text: str) -> UUID:
    found = uuid_in(text)
    if found is None:
        raise InvoiceNotFound
    return found
