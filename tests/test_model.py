"""Batched = model: what a random stream of calls is answered, and every row that it leaves, as a plain model predicts it."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar, Final

import msgspec
import psycopg
import pytest

from app.kernel.db import Database
from app.kernel.errors import AppError, InsufficientBalance
from app.kernel.security import Pepper, Sealer
from app.keys.issue import Keyring, change, revoke
from app.keys.verify import KeyOwner
from app.ledger.charge import ChargeId
from app.ledger.post import post
from app.ledger.tables import EntryKind
from app.metering.functions import ExtendAnswer, ReleaseAnswer
from app.metering.holds import Ask, Charged, Held, Meter, Work, expire_holds
from app.metering.refund import Refunded, refund
from tests.model import Account, Charge, Hold, Key, Refusal, Ticket
from tests.rig import reported
from tests.test_batches import ACTS, BALANCES, LONG_AGO, SERVICE, _in_waves, idle, meter, plant

KEYRING: Final = Keyring(Pepper(bytes(32)), Sealer([("test", bytes(32))]), reveal=False)
KEYS: Final[list[dict[str, Any]]] = [
    {}, {"limit_nusd": 900}, {"limit_nusd": 500, "reset_period": "day"}, {"limit_nusd": 700, "reset_period": "week"},
    {"scopes": ["spend"], "allowed_models": ["m", "n"]}, {"scopes": ["balance"]}, {"limit_nusd": 0},
]  # fmt: skip
RANKS: Final = {"settle": 0, "report": 0, "release": 1, "extend": 2, "authorize": 3, "charge": 4}
"""The order in which the verbs of a batch are decided; reports are settles without a hold."""
FIGURES: Final = ("required_usd", "available_usd", "captured_usd")


@dataclass(slots=True)
class Told:
    """A call as it is made, and as the model is asked about it."""

    rank: int
    account: Account
    request_id: str
    make: Callable[[], Awaitable[Any]]
    predict: Callable[[], Any]
    words: str


class Stream:
    """Random calls on a few accounts, each of which the model decides too."""

    keys: ClassVar = KEYS

    def __init__(self, seed: int, db: Database, conn: psycopg.Connection[Any]) -> None:
        self.choice, self.db, self.conn = random.Random(seed), db, conn
        self.meter: Meter = meter(db)
        self.owners = plant(conn, BALANCES, self.keys)
        self.accounts = [Account([key_like(each) for each in self.keys]) for _ in BALANCES]
        for account in self.accounts:
            [(_, reference, balance, _)] = self.entries(account)
            account.post("adjustment", reference, balance)
        self.tickets: list[tuple[str, Account, Ticket]] = []
        self.charges: list[tuple[str, Account, str]] = []
        self.low: Counter[uuid.UUID] = Counter()
        self.meter.on_low = lambda account_id: self.low.update([account_id])
        self.calls, self.verdicts = 0, Counter[str]()

    def ids(self, account: Account) -> uuid.UUID:
        return self.owners[self.accounts.index(account) * len(self.keys)].account_id

    async def run(self, calls: int) -> None:
        while self.calls < calls:
            act = self.choice.choices(("together", "refund", "act"), (80, 6, 14))[0]
            await getattr(self, act)()
            if act == "act" or self.choice.random() < 0.3:
                await self.top_up()

    # --- calls in one batch ---

    async def together(self) -> None:
        verbs = self.choice.choice([tuple(RANKS), tuple(RANKS), *((verb,) for verb in RANKS)])
        made = [getattr(self, self.choice.choice(verbs))() for _ in range(self.choice.randrange(1, 24))]
        calls: list[Told] = [call for call in made if call is not None]
        await idle()
        answers = await asyncio.gather(*(call.make() for call in calls), return_exceptions=True)
        identities = [((call.rank, id(call.account), call.request_id), None) for call in calls]
        for place in _in_waves(identities):
            self.compare(calls[place].words, calls[place].account, answers[place], calls[place].predict())

    def compare(self, words: str, account: Account, answer: Any, predicted: Any) -> None:
        assert plain(answer) == plain(predicted), (words, answer, predicted)
        self.calls += 1
        self.verdicts[predicted.name if isinstance(predicted, Refusal) else type(answer).__name__] += 1
        if isinstance(answer, Held):
            self.tickets.append((answer.hold_id, account, predicted[-1]))
            assert abs(answer.expires_at - account.holds[predicted[-1].request_id].expires_at) < timedelta(seconds=20)
        if isinstance(answer, Charged):
            charge_id = str(ChargeId(self.ids(account), answer.charge_id))
            request_id = next(name for name, charge in account.charges.items() if charge is predicted)
            self.charges.append((charge_id, account, request_id))

    def authorize(self) -> Told:
        owner, account, key = self.somebody()
        pick, amount_nusd = self.choice.choice, self.amount()
        ask = Ask(
            self.request_id(), amount_nusd, pick((None, "m", "x")), pick((None, "/chat")), 900,
            pick((None, None, min(amount_nusd, self.amount()))), pick((None, 3)), pick((None, None, b"asked")),
            pick((None, {"size": "large"})), None, pick(((), ("n", "o/n"))), pick(("captured", "captured", "hold", "release")),
        )  # fmt: skip
        return Told(
            RANKS["authorize"], account, ask.request_id, lambda: self.meter.authorize(SERVICE, owner, ask),
            lambda: account.authorize(key, ask, datetime.now(UTC)), f"authorize {ask}",
        )  # fmt: skip

    def charge(self) -> Told:
        (owner, account, key), work = self.somebody(), self.work()
        amount_nusd = work.cost_nusd + self.choice.choice((0, 0, 50))
        ask = Ask(self.request_id(), amount_nusd, self.choice.choice((None, "m", "x")), None)
        return Told(
            RANKS["charge"], account, ask.request_id, lambda: self.meter.charge(SERVICE, owner, ask, work),
            lambda: account.charge(key, ask, work, datetime.now(UTC)), f"charge {ask} {work}",
        )  # fmt: skip

    def report(self) -> Told:
        (owner, account, key), work = self.somebody(), self.work()
        ask = Ask(self.request_id(), work.cost_nusd, self.choice.choice((None, "m")), None)
        return Told(
            RANKS["report"], account, ask.request_id, lambda: reported(self.meter, SERVICE, owner, ask, work),
            lambda: account.report(key, ask, work, datetime.now(UTC)), f"report {ask} {work}",
        )  # fmt: skip

    def settle(self) -> Told | None:
        if not self.tickets:
            return None
        (hold_id, account, ticket), work = self.ticket(), self.work()
        if work.lines is None:
            work = msgspec.structs.replace(work, at_least_the_hold=self.choice.random() < 0.4)
        return Told(
            RANKS["settle"], account, ticket.request_id, lambda: self.meter.settle(SERVICE, hold_id, work),
            lambda: account.settle(ticket, work), f"settle {ticket} {work}",
        )  # fmt: skip

    def release(self) -> Told | None:
        if not self.tickets:
            return None
        hold_id, account, ticket = self.ticket()
        return Told(
            RANKS["release"], account, ticket.request_id, lambda: self.meter.release(SERVICE, hold_id),
            lambda: account.release(ticket), f"release {ticket}",
        )  # fmt: skip

    def extend(self) -> Told | None:
        if not self.tickets:
            return None
        (hold_id, account, ticket), captured_nusd = self.ticket(), self.choice.choice((0, self.amount()))
        return Told(
            RANKS["extend"], account, ticket.request_id, lambda: self.meter.extend(SERVICE, hold_id, 60, captured_nusd),
            lambda: account.extend(ticket, 60, captured_nusd, datetime.now(UTC)), f"extend {ticket} {captured_nusd}",
        )  # fmt: skip

    async def refund(self) -> None:
        if not self.charges:
            return
        charge_id, account, request_id = self.choice.choice(self.charges[-60:])
        amount = self.choice.choice((None, None, 1, 20, 100))
        try:
            answer: Any = await refund(self.db, SERVICE, charge_id, amount)
        except AppError as error:
            answer = error
        self.compare(f"refund {request_id} {amount}", account, answer, account.refund(request_id, amount))

    async def top_up(self) -> None:
        """An account that has run out gets something again, now and then more than one call needs."""
        owner, account, _ = self.somebody()
        missing = self.choice.choice((0, 100, 2_000, 20_000)) - account.posted
        if missing > 0:
            act_id = uuid.UUID(int=self.choice.getrandbits(128))
            reference = f"act/{act_id}"
            self.conn.execute(
                "INSERT INTO admin_log (id, admin, act, subject, amount_nusd) VALUES (%s, 'test', 'account.adjust', %s, %s)",
                [act_id, str(owner.account_id), missing],
            )
            await self.db.transaction(
                lambda session: post(session, owner.account_id, EntryKind.ADJUSTMENT, reference, "adjustment", missing)
            )
            account.post("adjustment", reference, missing)

    # --- what else happens ---

    async def act(self) -> None:
        owner, account, key = self.somebody()
        acts = ("patch", "patch", "lapse", "lapse", "expire", "expire", "yesterday", "yesterday", "crash", "retention",
                "freeze", "thaw", "thaw", "thaw", "watch", "lend", "revoke", "disable", "enable", "enable")  # fmt: skip
        await getattr(self, "act_" + self.choice.choice(acts))(owner, account, key)

    def sql(self, act: str, owner: KeyOwner) -> None:
        places = {
            "key": f"id = '{owner.key_id}'", "account": f"id = '{owner.account_id}'",
            "holds": f"account_id = '{owner.account_id}'",
        }  # fmt: skip
        self.conn.execute(ACTS[act].format(**places).encode())

    async def act_patch(self, owner: KeyOwner, account: Account, key: Key) -> None:
        if not key.is_live:
            return
        limit = self.choice.choice((None, 0, 300, 900))
        period = self.choice.choice((None, "day", "week", "month")) if limit is not None else None
        changes = {"limit_nusd": limit, "reset_period": period}
        await self.db.transaction(lambda session: change(session, KEYRING, owner.account_id, owner.key_id, changes))
        [(moment,)] = self.conn.execute("SELECT window_start FROM api_key WHERE id = %s", [owner.key_id]).fetchall()
        account.patch(key, limit, period, moment)

    async def act_revoke(self, owner: KeyOwner, account: Account, key: Key) -> None:
        if key.is_live and self.choice.random() < 0.2:
            await self.db.transaction(lambda session: revoke(session, KEYRING, owner.account_id, owner.key_id))
            account.revoke(key)

    async def act_disable(self, owner: KeyOwner, _: Account, key: Key) -> None:
        self.sql("disable", owner)
        key.is_disabled = True

    async def act_enable(self, owner: KeyOwner, _: Account, key: Key) -> None:
        self.sql("enable", owner)
        key.is_disabled = False

    async def act_freeze(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.sql("freeze", owner)
        account.is_frozen = True

    async def act_thaw(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.sql("thaw", owner)
        account.is_frozen = False

    async def act_watch(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.sql("watch", owner)
        account.low = 250

    async def act_lend(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.sql("lend", owner)
        account.floor = -500

    async def act_lapse(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.sql("lapse", owner)
        for hold in account.holds.values():
            hold.expires_at = datetime.now(UTC) - timedelta(seconds=1) if hold.state == "open" else hold.expires_at

    async def act_yesterday(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.sql("yesterday", owner)
        dated: list[Key | Hold | Charge] = [*account.keys, *account.holds.values(), *account.charges.values()]
        for each in dated:
            each.window -= timedelta(days=1)

    async def act_crash(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.sql("crash", owner)
        account.holds = {name: hold for name, hold in account.holds.items() if hold.state != "open"}

    async def act_retention(self, owner: KeyOwner, account: Account, _: Key) -> None:
        self.conn.execute("DELETE FROM hold WHERE account_id = %s AND state <> 'open'", [owner.account_id])
        account.holds = {name: hold for name, hold in account.holds.items() if hold.state == "open"}

    async def act_expire(self, _: KeyOwner, __: Account, ___: Key) -> None:
        now = datetime.now(UTC)
        count = sum(
            hold.state == "open" and hold.expires_at < now for each in self.accounts for hold in each.holds.values()
        )
        assert await expire_holds(self.db) == count
        for account in self.accounts:
            order = [request_id for kind, request_id, _, _ in self.entries(account) if kind == "usage"]
            assert set(account.due(now)) <= set(order)
            account.expire(now, order)

    # --- what is drawn ---

    def somebody(self) -> tuple[KeyOwner, Account, Key]:
        place, of_its = (
            self.choice.randrange(len(self.accounts)),
            self.choice.choice((0, 0, 0, 1, 2, 3, 4, *range(len(self.keys)))),
        )
        account = self.accounts[place]
        return self.owners[place * len(self.keys) + of_its], account, account.keys[of_its]

    def ticket(self) -> tuple[str, Account, Ticket]:
        """Mostly one of late; an old one too, whatever became of its hold."""
        is_open = [
            each
            for each in self.tickets[-60:]
            if (hold := each[1].holds.get(each[2].request_id)) and hold.state == "open"
        ]
        return self.choice.choice(is_open if is_open and self.choice.random() < 0.7 else self.tickets)

    def request_id(self) -> str:
        """Often one that was used before, with anything."""
        fresh = uuid.UUID(int=self.choice.getrandbits(128)).hex
        return self.choice.choice((f"r{self.choice.randrange(40)}", *[fresh] * 3))

    def amount(self) -> int:
        return self.choice.choice((0, 1, 20, 20, 50, 50, 100, 100, 300, 900, 3_000))

    def work(self) -> Work:
        pick, cost_nusd = self.choice.choice, self.amount()
        lines = {"parts": [cost_nusd, 0, 0, 0, 0], "lines": [["input", "input", cost_nusd, 1_000, 1_000_000]]}
        return Work(
            cost_nusd, pick(("completed", "partial")), pick((None, "served")), pick((None, "provider")), pick((None, "u\n1")),
            pick((None, 5)), None, pick((None, {"input_tokens": 3})), pick((None, 7)),
            pick((None, lines, lines | {"attributes": {"size": "large"}})), pick((None, "usage_estimated")),
        )  # fmt: skip

    # --- what is left ---

    def entries(self, account: Account) -> list[tuple[Any, ...]]:
        """Entries with request_ids in place of our ids."""
        return self.conn.execute(
            """SELECT e.kind, coalesce(u.request_id, r.request_id, e.reference), e.amount_nusd, e.balance_after_nusd FROM entry e
               LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
               LEFT JOIN usage r ON r.account_id = e.account_id AND e.kind = 'refund' AND r.id::text = e.reference
               WHERE e.account_id = %s ORDER BY e.id""",
            [self.ids(account)],
        ).fetchall()

    def same_rows(self) -> None:
        now = datetime.now(UTC)
        for number, account in enumerate(self.accounts):
            owners = self.owners[number * len(self.keys) : (number + 1) * len(self.keys)]
            of = {"id": self.ids(account)}
            assert self.entries(account) == account.entries
            assert self.conn.execute(
                "SELECT posted_nusd, held_nusd, entry_count FROM account WHERE id = %(id)s", of
            ).fetchall() == [(account.posted, account.held(), len(account.entries))]
            assert self.low[of["id"]] == account.said_low
            key_ids = {owner.key_id: key for owner, key in zip(owners, account.keys, strict=True)}
            rows = self.conn.execute(
                """SELECT id, limit_nusd, reset_period, held_nusd, lifetime_nusd, meter_window(k), meter_spent(k),
                          deleted_at IS NULL FROM api_key k WHERE account_id = %(id)s""", of,
            ).fetchall()  # fmt: skip
            assert {key_ids[row[0]]: row[1:] for row in rows} == {
                key: (key.limit, key.period, account.held(key), account.lifetime(key), key.window_at(now),
                      account.spent(key, now), key.is_live) for key in account.keys
            }  # fmt: skip
            rows = self.conn.execute(
                """SELECT request_id, key_id, window_start, amount_nusd, captured_nusd, state, on_expiry, price_version IS NULL
                   FROM hold WHERE account_id = %(id)s""", of,
            ).fetchall()  # fmt: skip
            assert {row[0]: (key_ids[row[1]], *row[2:7]) for row in rows} == {
                request_id: (hold.key, hold.window, hold.amount, hold.captured, hold.state, hold.on_expiry)
                for request_id, hold in account.holds.items()
            }
            rows = self.conn.execute(
                """SELECT request_id, key_id, window_start, cost_nusd, balance_after_nusd, held_after_nusd, flags, lines
                   FROM usage WHERE account_id = %(id)s""", of,
            ).fetchall()  # fmt: skip
            assert len(rows) == len(account.charges)
            assert {row[0]: (key_ids[row[1]], *row[2:]) for row in rows} == {
                request_id: (
                    made.key,
                    made.window,
                    made.cost,
                    made.balance_after,
                    made.held_after,
                    made.flags,
                    made.lines,
                )
                for request_id, made in account.charges.items()
            }
        self.conn.execute("UPDATE account SET low_nusd = NULL")  # nobody keeps these filled


def key_like(wanted: dict[str, Any]) -> Key:
    return Key(
        LONG_AGO,
        wanted.get("limit_nusd"),
        wanted.get("reset_period"),
        wanted.get("scopes"),
        wanted.get("allowed_models"),
    )


def plain(answer: Any) -> Any:
    """An answer, or what was predicted, as figures that can be compared."""
    match answer:
        case Held():
            return answer.amount_nusd, answer.available_nusd, answer.is_repeat, answer.price_version
        case Charged():
            return answer.cost_nusd, answer.balance_nusd, answer.held_nusd, answer.flags, answer.lines
        case Charge():
            return answer.cost, answer.balance_after, answer.held_after, answer.flags, answer.lines
        case Refunded():
            return answer.amount_nusd, answer.balance_nusd
        case AppError():
            told = answer.metadata or {}
            figures = [nusd(told[name]) for name in FIGURES if name in told]
            name = "InsufficientBalance" if isinstance(answer, InsufficientBalance) else type(answer).__name__
            return Refusal(name, (*figures, told["state"]) if "state" in told else tuple(figures))
        case ExtendAnswer():
            return answer.amount_nusd, answer.posted_nusd, answer.held_nusd, answer.floor_nusd
        case ReleaseAnswer():
            return answer.posted_nusd, answer.held_nusd
        case (*figures, Ticket()):
            return tuple(figures)
        case _:
            return answer


def nusd(raw: Any) -> int:
    return int(Decimal(bytes(raw).decode().strip('"')) * 10**9)


async def show(seed: int, calls: int, db: Database, conn: psycopg.Connection[Any]) -> Counter[str]:
    stream = Stream(seed, db, conn)
    await stream.run(calls)
    stream.same_rows()
    return stream.verdicts


@pytest.mark.parametrize("seed", range(2))
async def test_what_calls_are_answered_and_leave_is_what_the_model_predicts(
    db: Database, owner_conn: psycopg.Connection[Any], seed: int
) -> None:
    verdicts = await show(seed, 300, db, owner_conn)
    assert len(verdicts) > 6, verdicts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 121))
async def test_what_a_thousand_calls_are_answered_and_leave_is_what_the_model_predicts(
    db: Database, owner_conn: psycopg.Connection[Any], seed: int
) -> None:
    verdicts = await show(seed, 1_000, db, owner_conn)
    print(f"\n{verdicts.total()} calls: {dict(verdicts)}", end="")
