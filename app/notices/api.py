"""How HTTP asks for notices: where they go, a test, what was delivered; with the credit id."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Controller, delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, rows
from app.kernel.errors import InvalidField, NotFound
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber, is_given, parse_usd, usd_or_null
from app.kernel.pages import DEFAULT_LIMIT, from_cursor, page_size, to_cursor
from app.kernel.ratelimit import count_or_refuse
from app.kernel.security import Caller
from app.kernel.settings import Settings
from app.notices import address, outbox
from app.notices.address import Wish
from app.notices.courier import message_id
from app.notices.tell import EVENTS, TEST, tell
from app.notices.ways import Messages, Webhooks

CHANGES_PER_HOUR = 60
TESTS_PER_HOUR = 30
REPLAYS_PER_HOUR = 120
MAX_OVERLAP_SECONDS = 86_400


class NoticesRequest(msgspec.Struct, frozen=True):
    """All of it is set at once: what is left out, or null, is taken away. `events` left out: all."""

    webhook_url: Annotated[str, msgspec.Meta(min_length=1, max_length=512)] | None = None
    npub: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    low_balance_usd: JsonNumber = msgspec.Raw(b"")
    events: Annotated[list[str], msgspec.Meta(max_length=50)] | None = None

    def __repr__(self) -> str:
        return "NoticesRequest(…)"


class SecretRequest(msgspec.Struct, frozen=True):
    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_OVERLAP_SECONDS)] = MAX_OVERLAP_SECONDS


class NoticesView(msgspec.Struct, frozen=True):
    """Where notices go. The URL's path may hold a token, and is not shown. `signing_secret` is there once: when it is made."""

    webhook_url: str | None
    webhook_state: Literal["active", "gone"] | None
    npub: str | None
    sender_npub: str
    low_balance_usd: JsonNumber
    events: list[str]
    old_secret_until: datetime | None
    updated_at: datetime | None
    signing_secret: str | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, found: Row | None, messages: Messages, secret: str | None = None) -> "NoticesView":
        if found is None:
            return cls(None, None, None, messages.npub, usd_or_null(None), list(EVENTS), None, None)
        state: Literal["active", "gone"] = "active" if found["webhook_off_at"] is None else "gone"
        return cls(
            webhook_url=found["url_shown"],
            webhook_state=state if found["sealed_url"] is not None else None,
            npub=None if found["npub"] is None else messages.npub_of(found["npub"]),
            sender_npub=messages.npub,
            low_balance_usd=usd_or_null(found["low_balance_nusd"]),
            events=list(EVENTS) if found["events"] is None else found["events"],
            old_secret_until=found["secret_before_until"] if found["has_secret_before"] else None,
            updated_at=found["updated_at"],
            signing_secret=msgspec.UNSET if secret is None else secret,
        )


class NewSecret(msgspec.Struct, frozen=True):
    """A new signing secret, shown now and never again. Until `old_secret_until` the one before signs too."""

    signing_secret: str
    old_secret_until: datetime


class TestNotice(msgspec.Struct, frozen=True):
    """A test that is on its way; what became of it stands in `/notices/deliveries`."""

    id: str
    channels: list[Literal["webhook", "nostr"]]


class DeliveryView(msgspec.Struct, frozen=True):
    """A notice on one way. `dead` is one that was given up, after three days or because nobody wants it."""

    id: str
    channel: Literal["webhook", "nostr"]
    type: str
    data: msgspec.Raw
    state: Literal["pending", "delivered", "dead"]
    attempts: int
    last_status: int | None
    last_error: str | None
    created_at: datetime
    next_attempt_at: datetime | None
    closed_at: datetime | None

    @classmethod
    def of(cls, found: Row) -> "DeliveryView":
        same = {name: found[name] for name in ("channel", "type", "state", "attempts", "created_at", "closed_at")}
        return cls(
            **same, id=message_id(found["id"]), data=msgspec.Raw(found["data"].encode()), last_status=found["status"],
            last_error=found["error"], next_attempt_at=found["next_at"],
        )  # fmt: skip


class DeliveriesPage(msgspec.Struct, frozen=True):
    data: list[DeliveryView]
    next_cursor: str | None


class Replayed(msgspec.Struct, frozen=True):
    id: str
    deliveries: int


class NoticesController(Controller):
    """Be told what happens on the account: by a signed webhook, and by a Nostr direct message. All of it needs `x-credit-id`."""

    path = "/notices"
    tags = ("Notices",)

    @put("/", summary="Set where notices go")
    async def set_notices(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        settings: NamedDependency[Settings],
        webhooks: NamedDependency[Webhooks],
        messages: NamedDependency[Messages],
        data: JSONBody[NoticesRequest],
    ) -> NoticesView:
        """Replaces what was set before, which is told of it a last time. A webhook that was not there before gets a signing
        secret: it is in this answer, and never shown again."""
        wish = wish_of(data, webhooks, messages)
        await count_or_refuse(db, f"notices/{owner.account_id}", CHANGES_PER_HOUR)
        found, secret = await db.transaction(
            lambda session: address.put(session, settings.sealer, owner.account_id, wish)
        )
        return NoticesView.of(found, messages, secret)

    @get("/", summary="Show where notices go")
    async def read_notices(
        self, owner: NamedDependency[Caller], db: NamedDependency[Database], messages: NamedDependency[Messages]
    ) -> NoticesView:
        """Of the webhook's URL only its host; null where nothing is set."""
        return NoticesView.of(await db.transaction(lambda session: address.find(session, owner.account_id)), messages)

    @delete("/", status_code=204, summary="Have nothing told any more")
    async def remove_notices(
        self, owner: NamedDependency[Caller], db: NamedDependency[Database], settings: NamedDependency[Settings]
    ) -> None:
        """The addresses and `low_balance_usd` are forgotten; the addresses are told so."""
        await db.transaction(lambda session: address.remove(session, settings.sealer, owner.account_id))

    @post("/secret", status_code=200, summary="Make another signing secret")
    async def replace_secret(
        self,
        owner: NamedDependency[Caller],
        settings: NamedDependency[Settings],
        once: NamedDependency[Once],
        data: JSONBody[SecretRequest | None] = None,
    ) -> NewSecret:
        """Shown once. For `overlap_seconds` (a day, unless told) each webhook bears two signatures, by the new and the old."""
        overlap = timedelta(seconds=(data or SecretRequest()).overlap_seconds)

        async def effect(session: Any) -> NewSecret:
            secret = await address.another_secret(session, settings.sealer, owner.account_id, overlap)
            return NewSecret(secret, datetime.now(UTC) + overlap)

        return await once.do(NewSecret, effect)

    @post("/test", status_code=200, summary="Send a test")
    async def send_test(
        self, owner: NamedDependency[Caller], db: NamedDependency[Database], once: NamedDependency[Once]
    ) -> TestNotice:
        """A `notices.test`, on every way that is set, whatever events were chosen."""

        async def admit() -> None:
            await count_or_refuse(db, f"notices-test/{owner.account_id}", TESTS_PER_HOUR)

        return await once.do(TestNotice, lambda session: send_one(session, owner.account_id), admit=admit)

    @get("/deliveries", summary="List notices, and what became of them")
    async def list_deliveries(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        status: FromQuery[Literal["pending", "delivered", "dead"] | None] = None,
        limit: FromQuery[int] = DEFAULT_LIMIT,
        cursor: FromQuery[str | None] = None,
    ) -> DeliveriesPage:
        """Newest first; `status=dead` are those that were given up. Kept for 30 days after their end."""
        size, after = page_size(limit), from_cursor(cursor, tuple[datetime, UUID, str])
        found = await db.transaction(
            lambda session: outbox.list_deliveries(session, owner.account_id, size + 1, after, status)
        )
        last = found[size - 1] if len(found) > size else None
        return DeliveriesPage(
            [DeliveryView.of(each) for each in found[:size]],
            to_cursor(last["created_at"], last["id"], last["channel"]) if last else None,
        )

    @post("/deliveries/{notice_id:str}/replay", status_code=200, summary="Send a notice again")
    async def replay(
        self,
        owner: NamedDependency[Caller],
        db: NamedDependency[Database],
        once: NamedDependency[Once],
        notice_id: FromPath[str],
    ) -> Replayed:
        """At once, with the same `webhook-id`, to the address of today; also one that was delivered."""
        found = _notice_id(notice_id)

        async def admit() -> None:
            await count_or_refuse(db, f"notices-replay/{owner.account_id}", REPLAYS_PER_HOUR)

        async def effect(session: AsyncSession) -> Replayed:
            return Replayed(notice_id, await outbox.replay(session, owner.account_id, found))

        return await once.do(Replayed, effect, admit=admit)


async def send_one(session: AsyncSession, account_id: UUID) -> TestNotice:
    """Raises InvalidField where nothing is set."""
    notice_id = await tell(session, account_id, TEST, {"message": "Notices reach you here."})
    made = await rows(
        session, "SELECT channel FROM notice WHERE account_id = :account_id AND id = :id ORDER BY channel DESC",
        account_id=account_id, id=notice_id,
    )  # fmt: skip
    if not made:
        raise InvalidField("No address is set, or its webhook wants no more (410): PUT /notices sets one")
    return TestNotice(message_id(notice_id), [each["channel"] for each in made])


def _notice_id(text: str) -> UUID:
    try:
        if not text.startswith("msg_") or len(text) != 36:
            raise ValueError
        return UUID(hex=text[4:])
    except ValueError:
        raise NotFound("No such notice") from None


def wish_of(data: NoticesRequest, webhooks: Webhooks, messages: Messages) -> Wish:
    """Raises InvalidField."""
    unknown = sorted({*(data.events or ())} - {*EVENTS})
    if unknown:
        raise InvalidField(
            f"events: there is none named {unknown[0][:40]!r}; there are {', '.join(EVENTS)}", param="events"
        )
    low = parse_usd(data.low_balance_usd, "low_balance_usd") if is_given(data.low_balance_usd) else None
    return Wish(
        url=data.webhook_url,
        url_shown=None if data.webhook_url is None else webhooks.shown(data.webhook_url),
        key=None if data.npub is None else messages.key_of(data.npub),
        low_balance_nusd=low,
        events=None if data.events is None else list(dict.fromkeys(data.events)),
    )
