"""How operators ask about top-ups: by state, those that wait for a person, what was paid and is not credited."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from litestar import Controller, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin import topups
from app.admin.api.asked import Reason, topup_in
from app.admin.topups import State
from app.kernel.db import Database, Row
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, is_given, parse_usd, usd
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.security import Admin
from app.kernel.settings import Settings
from app.topups.gateway import Gateways
from app.topups.review import ref_of

InState = Annotated[State, QueryParameter(name="state")]


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
    """Top-ups of every account, and the review queue. Needs an admin token."""

    path = "/admin/topups"
    tags = ("Admin",)

    @get("/", summary="Top-ups by state")
    async def list_by_state(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        in_state: InState = "review",
        account_id: FromQuery[UUID | None] = None,
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> ReviewPage:
        """Those that wait for a person if no state is asked for: marked by hand, invalid, settled short, or not what was
        asked for. These and `unapplied` come oldest first, the others newest first."""
        return await _page(db, in_state, account_id, limit, cursor)

    @get("/unapplied", summary="Top-ups that were paid and are not credited")
    async def list_unapplied(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> ReviewPage:
        """The same as `state=unapplied`: the payment may still be on its way; `reconcile` asks the backend now."""
        return await _page(db, "unapplied", None, limit, cursor)

    @post("/{topup_id:str}/reconcile", status_code=200, summary="Ask the backend now")
    async def reconcile(
        self,
        admin: NamedDependency[Admin],
        db: NamedDependency[Database],
        gateways: NamedDependency[Gateways],
        once: NamedDependency[Once],
        settings: NamedDependency[Settings],
        topup_id: FromPath[str],
    ) -> ReviewedTopup:
        """Credits what was paid and is not credited yet."""
        ref = await db.transaction(lambda session: ref_of(session, topup_in(topup_id)))
        before: Row = {}

        async def admit() -> None:
            before.update(await topups.ask_backend(db, gateways, ref))

        async def effect(session: AsyncSession) -> ReviewedTopup:
            return ReviewedTopup.of(await topups.note_reconciled(session, settings.pepper, admin, ref, before))

        return await once.do(ReviewedTopup, effect, admit=admit)

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
        amount_nusd = parse_usd(data.amount_usd, "amount_usd") if is_given(data.amount_usd) else None
        ref = await db.transaction(lambda session: ref_of(session, topup_in(topup_id)))

        async def effect(session: AsyncSession) -> ReviewedTopup:
            told = data.action, amount_nusd, data.reason, data.finding_id
            return ReviewedTopup.of(await topups.decide(session, settings.pepper, admin, ref, *told))

        return await once.do(ReviewedTopup, effect)


async def _page(db: Database, state: State, account_id: UUID | None, limit: int, cursor: str | None) -> ReviewPage:
    size, after = page_size(limit), from_cursor(cursor, tuple[datetime, UUID])
    found = await db.transaction(lambda session: topups.list_by_state(session, state, size + 1, after, account_id))
    last = found[size - 1] if len(found) > size else None
    return ReviewPage(
        [ReviewedTopup.of(topup) for topup in found[:size]], to_cursor(last["created_at"], last["id"]) if last else None
    )
