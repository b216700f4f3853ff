"""Batches change no answer and no row: whatever is decided together is decided as if each call had come alone."""

import asyncio
import os
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from app.kernel.db import Database, Lane, Params
from app.kernel.errors import AppError, DatabaseUnavailable, InvalidField
from app.kernel.security import Pepper
from app.keys.verify import KeyOwner
from app.metering.arrays import as_array
from app.metering.batch import Batches
from app.metering.functions import (
    FUNCTIONS,
    CallAnswer,
    CallParams,
    ExtendAnswer,
    ExtendParams,
    Function,
    ReleaseAnswer,
)
from app.metering.holds import Ask, Charged, Held, Meter, Work, expire_holds
from app.migrations import MigrationError, check, migrate
from tests.databases import CITUS

PEPPER = Pepper(b"a pepper for tests, of 32 bytes and more")
SERVICE = "proxy"
LONG_AGO = datetime(2026, 1, 5, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Side:
    """The same accounts once more, and the meter that this copy of them is asked through."""

    meter: Meter
    owners: list[KeyOwner]
    low: Counter[uuid.UUID] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.meter.on_low = lambda account_id: self.low.update([account_id])

    def low_counts(self) -> list[int]:
        """How often each of the accounts was said to be low."""
        return [self.low[account_id] for account_id in dict.fromkeys(owner.account_id for owner in self.owners)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parameters of each statement that waited for an account."""
    asked, many = [], Database.many

    async def noted(self: Database, statement: Any, params: Any) -> Any:
        asked.append(params)
        return await many(self, statement, params)

    monkeypatch.setattr(Database, "many", noted)
    return asked


def meter(db: Database, *, batch: bool = True) -> Meter:
    return Meter(db, PEPPER, hold_sync_commit=True, batch=batch, by_account=bool(CITUS))


def plant(conn: psycopg.Connection[Any], balances_nusd: Iterable[int], keys: list[dict[str, Any]]) -> list[KeyOwner]:
    """Accounts with these balances, each with a key like each of `keys`."""
    owners = []
    for balance_nusd in balances_nusd:
        account_id = uuid.uuid4()
        conn.execute(
            "INSERT INTO account (id, posted_nusd, entry_count) VALUES (%s, %s, 1)", [account_id, balance_nusd]
        )
        act_id = uuid.uuid4()
        conn.execute(
            "INSERT INTO admin_log (id, admin, act, subject, amount_nusd) VALUES (%s, 'test', 'account.adjust', %s, %s)",
            [act_id, str(account_id), balance_nusd],
        )
        conn.execute(
            """INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
               VALUES (%s, 1, 'adjustment', %s, 'adjustment', %s, %s)""",
            [account_id, f"act/{act_id}", balance_nusd, balance_nusd],
        )
        secret = "INSERT INTO credential (secret_hash, kind, account_id, key_id) VALUES (%s, %s, %s, %s)"
        conn.execute(secret, [uuid.uuid4().bytes, "credit_id", account_id, None])
        for number, key in enumerate(keys):
            key_id = uuid.uuid4()
            wanted = {"limit_nusd": None, "reset_period": None, "scopes": None, "allowed_models": None} | key
            conn.execute(
                """INSERT INTO api_key (account_id, id, name, preview, window_start, limit_nusd, reset_period, scopes, allowed_models)
                   VALUES (%s, %s, %s, 'sk-', %s, %s, %s, %s, %s)""",
                [account_id, key_id, f"key {number}", LONG_AGO, *wanted.values()],
            )
            conn.execute(secret, [uuid.uuid4().bytes, "api_key", account_id, key_id])
            owners.append(KeyOwner(account_id, key_id))
    return owners


async def outcome(call: Awaitable[Any]) -> Any:
    """What a call answers, without ids and times; a refusal in full."""
    try:
        answer = await call
    except AppError as error:
        return type(error).__name__, error.message, msgspec.json.encode(error.wire())
    if isinstance(answer, Held):
        return answer
    if isinstance(answer, Charged):
        return answer.cost_nusd, answer.balance_nusd, answer.held_nusd, answer.flags, answer.lines
    assert isinstance(answer, CallAnswer)
    return {name: value for name, value in msgspec.structs.asdict(answer).items() if name != "expires_at"}


# --- the same stream, one by one and in batches -------------------------------------------------------

KEYS: list[dict[str, Any]] = [
    {}, {"limit_nusd": 900}, {"limit_nusd": 500, "reset_period": "day"}, {"limit_nusd": 700, "reset_period": "month"},
    {"scopes": ["spend"], "allowed_models": ["m", "n"]}, {"scopes": ["balance"]}, {"limit_nusd": 0},
]  # fmt: skip
BALANCES = (0, 300, 2_000, 100_000)
ACTS = {
    "revoke": "UPDATE api_key SET deleted_at = now() WHERE {key}",
    "disable": "UPDATE api_key SET disabled_at = now() WHERE {key}",
    "enable": "UPDATE api_key SET disabled_at = NULL WHERE {key}",
    "expire key": "UPDATE api_key SET expire_at = now() WHERE {key}",
    "freeze": "UPDATE account SET status = 'frozen' WHERE {account}",
    "thaw": "UPDATE account SET status = 'active' WHERE {account}",
    "watch": "UPDATE account SET low_nusd = 250 WHERE {account}",
    "lend": """WITH lent AS (UPDATE account SET floor_nusd = -500 WHERE {account} RETURNING id)
               INSERT INTO admin_log (id, admin, act, subject, amount_nusd)
               SELECT gen_random_uuid(), 'test', 'account.floor', id, -500 FROM lent""",
    "lapse": "UPDATE hold SET expires_at = now() - interval '1 second' WHERE {holds} AND state = 'open'",
    "yesterday": """WITH k AS (UPDATE api_key SET window_start = window_start - interval '1 day' WHERE {holds}),
                         h AS (UPDATE hold SET window_start = window_start - interval '1 day' WHERE {holds})
                    UPDATE usage SET window_start = window_start - interval '1 day' WHERE {holds}""",
    "crash": """WITH lost AS (DELETE FROM hold WHERE {holds} AND state = 'open'),
                     k AS (UPDATE api_key SET held_nusd = 0 WHERE {holds})
                UPDATE account SET held_nusd = 0 WHERE {account}""",
}


VERBS = {"authorize": 25, "settle": 15, "charge": 15, "mixed": 33, "release": 3, "extend": 2, "act": 12}
IN_A_BATCH = ("settle", "release", "extend", "authorize", "charge")
"""The order in which the verbs of a batch are decided."""


class Stream:
    """A random stream of rounds. A round is one verb many times, or those of a batch mixed: in an order that is known."""

    def __init__(self, seed: int, single: Side, batched: Side, conn: psycopg.Connection[Any], db: Database) -> None:
        self.choice = random.Random(seed)
        self.sides, self.conn, self.db = (single, batched), conn, db
        self.tickets: list[tuple[str, str]] = []
        self.request_ids = [f"r{number}" for number in range(40)]

    async def run(self, rounds: int) -> None:
        for _ in range(rounds):
            verb = self.choice.choices((*VERBS,), (*VERBS.values(),))[0]
            if verb == "act":
                await self.act()
            else:
                await self.together(IN_A_BATCH if verb == "mixed" else (verb,))

    async def together(self, verbs: Sequence[str]) -> None:
        """One after the other on one side, all at once on the other; the answers must be the same."""
        wanted = [self.choice.choice(verbs) for _ in range(self.choice.randrange(1, 25))]
        made = [(verbs.index(verb), getattr(self, verb)()) for verb in wanted]
        calls = [((rank, call[0]), call[1]) for rank, call in made if call is not None]
        order = list(_in_waves(calls))
        single = [await outcome(calls[place][1](self.sides[0], 0)) for place in order]
        await idle()
        answers = await asyncio.gather(*(outcome(call(self.sides[1], 1)) for _, call in calls))
        batched = [answers[place] for place in order]
        for place, one, other in zip(order, single, batched, strict=True):
            if isinstance(one, Held) and isinstance(other, Held):
                self.tickets.append((one.hold_id, other.hold_id))
                one, other = (one.amount_nusd, one.available_nusd), (other.amount_nusd, other.available_nusd)
            assert one == other, (calls[place][0], one, other)

    def authorize(self) -> Any:
        number, request_id = self.choice.randrange(len(self.sides[0].owners)), self._request_id()
        amount_nusd, pick = self._amount(), self.choice.choice
        min_nusd = pick((None, None, min(amount_nusd, self._amount())))
        ask = Ask(
            request_id, amount_nusd, pick((None, "m", "x")), pick((None, "/chat")), 900, min_nusd, pick((None, 3))
        )
        return (number // len(KEYS), request_id), lambda side, _: side.meter.authorize(
            SERVICE, side.owners[number], ask
        )

    def settle(self) -> Any:
        if not self.tickets:
            return None
        tickets, work = self.choice.choice(self.tickets), self._work()
        return tickets[0], lambda side, place: side.meter.settle(SERVICE, tickets[place], work)

    def charge(self) -> Any:
        number, request_id, work = self.choice.randrange(len(self.sides[0].owners)), self._request_id(), self._work()
        ask = Ask(
            request_id, work.cost_nusd + self.choice.choice((0, 0, 50)), self.choice.choice((None, "m", "x")), None
        )
        return (number // len(KEYS), request_id), lambda side, _: side.meter.charge(
            SERVICE, side.owners[number], ask, work
        )

    def release(self) -> Any:
        if not self.tickets:
            return None
        tickets = self.choice.choice(self.tickets)
        return tickets[0], lambda side, place: side.meter.release(SERVICE, tickets[place])

    def extend(self) -> Any:
        if not self.tickets:
            return None
        tickets, captured_nusd = self.choice.choice(self.tickets), self._amount()
        return tickets[0], lambda side, place: side.meter.extend(SERVICE, tickets[place], 60, captured_nusd)

    async def act(self) -> None:
        number, name = self.choice.randrange(len(self.sides[0].owners)), self.choice.choice((*ACTS, *["yesterday"] * 6))
        for side in self.sides:
            owner = side.owners[number]
            places = {
                "key": f"id = '{owner.key_id}'", "account": f"id = '{owner.account_id}'",
                "holds": f"account_id = '{owner.account_id}'",
            }  # fmt: skip
            self.conn.execute(ACTS[name].format(**places).encode())
        await expire_holds(self.db)

    def _request_id(self) -> str:
        """Often one that was used before; a request_id may be tried with anything."""
        return self.choice.choice(
            (*self.request_ids, *(uuid.UUID(int=self.choice.getrandbits(128)).hex for _ in range(60)))
        )

    def _amount(self) -> int:
        return self.choice.choice((0, 1, 20, 50, 50, 100, 300, 900, 3_000))

    def _work(self) -> Work:
        pick = self.choice.choice
        cost_nusd = self._amount()
        lines = {"parts": [cost_nusd, 0, 0, 0, 0], "lines": [["input", "input", cost_nusd, 1_000, 1_000_000]]}
        return Work(
            cost_nusd, pick(("completed", "partial")), pick((None, 'served "by" \\ {us}, NULL')), pick((None, "NULL", "")), pick((None, "u\n1")),
            pick((None, 5)), pick((None, 2**31 - 1)), pick((None, {"input_tokens": 3})), pick((None, 7)), pick((None, lines)),
            pick((None, "usage_estimated")),
        )  # fmt: skip


async def idle() -> None:
    """Until no batches are at work: calls that come while they give their connection back are not taken all at once."""
    while any(task.get_coro().__qualname__ == "Batches._decide_all" for task in asyncio.all_tasks()):  # type: ignore[union-attr]
        await asyncio.sleep(0)


def _in_waves(calls: list[Any]) -> Iterable[int]:
    """The places of calls in the order of batches: each once, verb by verb, then the repeats, and so on."""
    seen: Counter[Any] = Counter()
    waves: list[tuple[int, int, int]] = []
    for place, (identity, _) in enumerate(calls):
        waves.append((seen[identity], identity[0], place))
        seen[identity] += 1
    return [place for _, _, place in sorted(waves)]


ROWS = {
    "account": "SELECT posted_nusd, held_nusd, floor_nusd, low_nusd, entry_count, status FROM account WHERE id = %(account_id)s",
    "api_key": """SELECT limit_nusd, held_nusd, window_start, window_usage_nusd, lifetime_nusd, deleted_at IS NULL FROM api_key
                  WHERE account_id = %(account_id)s AND id = %(key_id)s""",
    "hold": """SELECT service, request_id, window_start, amount_nusd, captured_nusd, state, on_expiry, model, endpoint, price_version,
                      CASE WHEN expires_at - created_at > interval '5 minutes' THEN date_trunc('minute', expires_at - created_at + interval '30 seconds') END, id
               FROM hold WHERE account_id = %(account_id)s AND key_id = %(key_id)s ORDER BY id""",
    "entry": """SELECT e.id, kind, CASE kind WHEN 'usage' THEN reference END, contra, amount_nusd, e.balance_after_nusd, u.hold_id FROM entry e
                LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
                WHERE e.account_id = %(account_id)s ORDER BY id""",
    "usage": """SELECT hold_id, service, request_id, window_start, model, served_model, provider, endpoint, outcome, upstream_id,
                       cost_nusd, balance_after_nusd, held_after_nusd, latency_ms, ttft_ms, units, price_version, lines, flags FROM usage
                WHERE account_id = %(account_id)s AND key_id = %(key_id)s ORDER BY hold_id""",
}


def same_rows(conn: psycopg.Connection[Any], single: Side, batched: Side) -> None:
    for one, other in zip(single.owners, batched.owners, strict=True):
        for table, query in ROWS.items():
            rows = [
                conn.execute(query, {"account_id": owner.account_id, "key_id": owner.key_id}).fetchall()
                for owner in (one, other)
            ]
            assert rows[0] == rows[1], table


@pytest.mark.parametrize("seed", range(3))
async def test_a_random_stream_leaves_the_same_answers_and_rows_batched_and_not(
    db: Database, owner_conn: psycopg.Connection[Any], seed: int
) -> None:
    single = Side(meter(db, batch=False), plant(owner_conn, BALANCES, KEYS))
    batched = Side(meter(db, batch=True), plant(owner_conn, BALANCES, KEYS))
    await Stream(seed, single, batched, owner_conn, db).run(60)
    same_rows(owner_conn, single, batched)
    assert single.low_counts() == batched.low_counts()
    owner_conn.execute("UPDATE account SET low_nusd = NULL")  # nobody keeps these filled


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 100 + int(os.environ.get("RANDOM_STREAMS", "40"))))
async def test_a_long_random_stream_leaves_the_same_answers_and_rows_batched_and_not(
    db: Database, owner_conn: psycopg.Connection[Any], seed: int
) -> None:
    single = Side(meter(db, batch=False), plant(owner_conn, BALANCES, KEYS))
    batched = Side(meter(db, batch=True), plant(owner_conn, BALANCES, KEYS))
    await Stream(seed, single, batched, owner_conn, db).run(400)
    same_rows(owner_conn, single, batched)
    assert single.low_counts() == batched.low_counts()
    owner_conn.execute("UPDATE account SET low_nusd = NULL")  # nobody keeps these filled


@pytest.mark.parametrize("batch", [True, False])
async def test_flags_are_kept_with_a_comma_between_them_and_nowhere_else(
    db: Database, owner_conn: psycopg.Connection[Any], batch: bool
) -> None:
    side = Side(meter(db, batch=batch), plant(owner_conn, [1_000], [{}]))
    (owner,) = side.owners
    held = [await side.meter.authorize(SERVICE, owner, Ask(f"h{n}", 50, None, None)) for n in range(5)]
    works = [Work(50 + n % 2, flags="usage_estimated" if n < 4 else None) for n in range(5)]
    pairs = zip(held, works, strict=True)
    await asyncio.gather(*(side.meter.settle(SERVICE, each.hold_id, work) for each, work in pairs))
    found = owner_conn.execute("SELECT flags FROM usage ORDER BY request_id").fetchall()
    assert found == [("usage_estimated",), ("above_hold,usage_estimated",)] * 2 + [("",)]


@pytest.mark.parametrize("batch", [True, False])
async def test_a_hold_that_was_lost_is_told_from_one_that_was_never_made(
    db: Database, owner_conn: psycopg.Connection[Any], batch: bool
) -> None:
    side = Side(meter(db, batch=batch), plant(owner_conn, [1_000], [{}]))
    (owner,) = side.owners
    held = [await side.meter.authorize(SERVICE, owner, Ask(f"h{n}", 50, None, None)) for n in range(3)]
    lost = [side.meter.opened(SERVICE, each.hold_id) for each in held]
    owner_conn.execute(ACTS["crash"].format(holds="true", account="true").encode())
    never = [
        msgspec.structs.replace(ticket, hold_id=uuid.uuid4(), request_id=f"e{n}", window_start=None)
        for n, ticket in enumerate(lost)
    ]
    await asyncio.gather(*(side.meter.settle(SERVICE, ticket, Work(5)) for ticket in (*lost, *never)))
    found = owner_conn.execute("SELECT flags FROM usage ORDER BY request_id").fetchall()
    assert found == [("no_hold",)] * 3 + [("hold_missing",)] * 3


@pytest.mark.parametrize("batch", [True, False])
async def test_each_charge_that_leaves_less_than_the_mark_says_so(
    db: Database, owner_conn: psycopg.Connection[Any], batch: bool
) -> None:
    side = Side(meter(db, batch=batch), plant(owner_conn, [1_000], [{}]))
    (owner,) = side.owners
    owner_conn.execute("UPDATE account SET low_nusd = 500")
    held = [await side.meter.authorize(SERVICE, owner, Ask(f"h{n}", 50, None, None)) for n in range(5)]
    await asyncio.gather(*(side.meter.settle(SERVICE, each.hold_id, Work(100)) for each in held))
    assert side.low_counts() == [0], "500 are not less than 500"
    await asyncio.gather(
        *(side.meter.charge(SERVICE, owner, Ask(f"c{n}", 100, None, None), Work(100)) for n in range(5))
    )
    assert side.low_counts() == [5]
    owner_conn.execute("UPDATE account SET low_nusd = NULL")


# --- races --------------------------------------------------------------------------------------------


async def test_sixty_four_at_once_through_two_workers_never_pass_the_balance(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    workers = [meter(db), meter(db)]
    answers = await asyncio.gather(
        *(outcome(workers[n % 2].authorize(SERVICE, owner, Ask(f"r{n}", 100, None, None))) for n in range(64))
    )
    assert sum(isinstance(answer, Held) for answer in answers) == 10


async def test_sixty_four_repeats_at_once_through_two_workers_have_one_effect(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    workers = [meter(db), meter(db)]
    held = await asyncio.gather(
        *(workers[n % 2].authorize(SERVICE, owner, Ask("r", 100, None, None)) for n in range(64))
    )
    assert len({each.hold_id for each in held}) == 1
    settled = await asyncio.gather(*(workers[n % 2].settle(SERVICE, held[0].hold_id, Work(n + 1)) for n in range(64)))
    assert len({each.charge_id for each in settled}) == 1
    charged = await asyncio.gather(
        *(workers[n % 2].charge(SERVICE, owner, Ask("c", 7, None, None), Work(7)) for n in range(64))
    )
    assert len({each.charge_id for each in charged}) == 1
    assert owner_conn.execute("SELECT count(*) FROM usage").fetchone() == (2,)


async def test_every_verb_at_once_on_many_accounts_leaves_the_books_right(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    owners = plant(owner_conn, [5_000] * 5, [{}, {"limit_nusd": 2_000, "reset_period": "day"}])
    workers = [meter(db), meter(db), meter(db, batch=False)]

    async def call(number: int) -> None:
        owner, worker = owners[number % len(owners)], workers[number % len(workers)]
        if number % 4 == 0:
            await outcome(worker.charge(SERVICE, owner, Ask(f"c{number}", 40, None, None), Work(40)))
            return
        held = await outcome(worker.authorize(SERVICE, owner, Ask(f"h{number}", 100, None, None)))
        if isinstance(held, Held):
            ending = (
                worker.settle(SERVICE, held.hold_id, Work(150)) if number % 3 else worker.release(SERVICE, held.hold_id)
            )
            await ending

    await asyncio.gather(*(call(number) for number in range(400)))
    assert owner_conn.execute("SELECT count(*) FROM hold WHERE state = 'open'").fetchone() == (0,)


@pytest.mark.parametrize("hold_sync_commit", [True, False])
async def test_all_verbs_share_a_transaction_unless_holds_need_not_be_durable(
    db: Database, owner_conn: psycopg.Connection[Any], hold_sync_commit: bool
) -> None:
    first, second, third = plant(owner_conn, [1_000] * 3, [{}])
    batching = Meter(db, PEPPER, hold_sync_commit=hold_sync_commit, batch=True)
    held = [await batching.authorize(SERVICE, first, Ask(f"h{n}", 50, None, None)) for n in range(2)]
    owner_conn.execute("CREATE TABLE durability AS SELECT '' AS of_table, '' AS setting LIMIT 0")
    owner_conn.execute("GRANT INSERT ON durability TO satmeter_runtime")
    owner_conn.execute(
        """CREATE FUNCTION note_durability() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN
               INSERT INTO durability VALUES (concat_ws(' ', TG_TABLE_NAME, to_jsonb(NEW) ->> 'state'), current_setting('synchronous_commit'));
               RETURN NULL;
           END $$"""
    )
    try:
        for table in ("hold", "entry"):
            owner_conn.execute(
                f"CREATE TRIGGER noted AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION note_durability()".encode()
            )
        await asyncio.gather(
            *(batching.authorize(SERVICE, second, Ask(f"r{n}", 50, None, None)) for n in range(2)),
            *(batching.settle(SERVICE, each.hold_id, Work(20)) for each in held),
            *(batching.charge(SERVICE, third, Ask(f"c{n}", 20, None, None), Work(20)) for n in range(2)),
        )
        settings = set(owner_conn.execute("SELECT * FROM durability").fetchall())
    finally:
        owner_conn.execute("DROP FUNCTION note_durability CASCADE")
        owner_conn.execute("DROP TABLE durability")
    made_in = owner_conn.execute(
        """SELECT xmin::text FROM hold WHERE request_id LIKE 'r%' UNION SELECT xmin::text FROM entry WHERE kind = 'usage'"""
    ).fetchall()
    assert len(made_in) == (1 if hold_sync_commit else 2)
    assert settings == {
        ("hold open", "on" if hold_sync_commit else "off"), ("hold settled", "on"), ("entry", "on")
    }  # fmt: skip


async def test_workers_whose_batches_cross_do_not_wait_for_each_other_for_ever(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    """One settles where the other authorizes. Who waits for accounts of a batch never has others locked meanwhile."""
    sides = plant(owner_conn, [10**9] * 8, [{}]), plant(owner_conn, [10**9] * 8, [{}])
    workers = meter(db), meter(db)

    async def work(number: int) -> None:
        worker, settling, asking = workers[number], sides[number], sides[1 - number]
        for turn in range(100):
            held = await asyncio.gather(
                *(worker.authorize(SERVICE, owner, Ask(f"{number}.{turn}", 1, None, None)) for owner in settling)
            )
            await asyncio.gather(
                *(worker.settle(SERVICE, each.hold_id, Work(1)) for each in held),
                *(worker.authorize(SERVICE, owner, Ask(f"{number}.{turn}b", 1, None, None)) for owner in asking),
            )

    def deadlocks() -> int:
        found = owner_conn.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        return sum(count for (count,) in found)

    before = deadlocks()
    await asyncio.gather(work(0), work(1))
    assert deadlocks() == before
    assert owner_conn.execute("SELECT count(*), count(*) FILTER (WHERE state = 'settled') FROM hold").fetchone() == (
        3_200,
        1_600,
    )


# --- one's trouble is not the others' -----------------------------------------------------------------


async def spoilt(batching: Meter, owners: list[KeyOwner]) -> tuple[list[tuple[str, Work]], list[str]]:
    """Settles of the first's holds of which one alone is possible, as twice of it is more than the account's figure can hold;
    and the holds of the others."""
    first, *others = [(await batching.authorize(SERVICE, owner, Ask("r", 100, None, None))).hold_id for owner in owners]
    extra = await batching.authorize(SERVICE, owners[0], Ask("r2", 100, None, None))
    return [(hold_id, Work(2**63 - 1)) for hold_id in (extra.hold_id, first)], others


async def settled(batching: Meter, calls: list[tuple[str, Work]]) -> list[Any]:
    """At once: what each is answered."""
    asked = (batching.settle(SERVICE, hold_id, work) for hold_id, work in calls)
    return await asyncio.gather(*asked, return_exceptions=True)


async def test_one_impossible_charge_does_not_fail_its_neighbours(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    batching = meter(db)
    impossible, others = await spoilt(batching, plant(owner_conn, [1_000] * 20, [{}]))
    answers = await settled(batching, impossible + [(hold_id, Work(10)) for hold_id in others])
    assert Counter(type(answer) for answer in answers[:2]) == {Charged: 1, InvalidField: 1}
    assert [answer.balance_nusd for answer in answers[2:]] == [990] * 19


async def test_what_waits_behind_a_batch_that_cannot_be_decided_does_not_overtake_its_calls(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    batching = meter(db)
    impossible, others = await spoilt(batching, plant(owner_conn, [1_000] * 11, [{}]))
    twice = [(hold_id, Work(cost_nusd)) for cost_nusd in (10, 20) for hold_id in others]
    answers = await settled(batching, impossible + twice)
    assert [answer.cost_nusd for answer in answers[2:]] == [10] * 20


async def test_an_account_that_is_locked_does_not_hold_up_the_others(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    owners = plant(owner_conn, [1_000] * 10, [{}])
    batching = meter(db)
    with owner_conn.transaction():
        owner_conn.execute("SELECT 1 FROM account WHERE id = %s FOR UPDATE", [owners[0].account_id])
        calls = [asyncio.create_task(batching.authorize(SERVICE, owner, Ask("r", 1, None, None))) for owner in owners]
        await asyncio.wait(calls[1:], timeout=8)
        assert all(call.done() for call in calls[1:])
        assert not calls[0].done()
        more = await asyncio.gather(
            *(batching.authorize(SERVICE, owner, Ask("s", 1, None, None)) for owner in owners[1:])
        )
        assert len(more) == 9
    assert (await calls[0]).available_nusd == 999


async def test_calls_of_an_account_that_is_locked_are_decided_together_when_it_is_free(
    db: Database, owner_conn: psycopg.Connection[Any], alone: list[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    batching = meter(db)
    with owner_conn.transaction():
        owner_conn.execute("SELECT 1 FROM account FOR UPDATE")
        calls = [asyncio.create_task(batching.authorize(SERVICE, owner, Ask("first", 1, None, None)))]
        await asyncio.sleep(0.1)
        calls += [
            asyncio.create_task(batching.authorize(SERVICE, owner, Ask(f"r{n}", 1, None, None))) for n in range(20)
        ]
        await asyncio.sleep(0.1)
    assert len(await asyncio.gather(*calls)) == 21
    assert len(alone) == 2, "the first waits for the account, the others for it"


async def test_what_can_never_be_found_is_answered_though_no_row_comes(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    batching, gone = meter(db), KeyOwner(uuid.uuid4(), uuid.uuid4())
    held = await batching.authorize(SERVICE, owner, Ask("r", 1, None, None))
    ticket = msgspec.structs.replace(batching.opened(SERVICE, held.hold_id), hold_id=uuid.uuid4())
    answers = await asyncio.gather(
        outcome(batching.release(SERVICE, ticket)), outcome(batching.authorize(SERVICE, gone, Ask("r", 1, None, None))),
        outcome(batching.charge(SERVICE, gone, Ask("c", 1, None, None), Work(1))),
        outcome(batching.settle(SERVICE, msgspec.structs.replace(ticket, account_id=gone.account_id), Work(1))),
    )  # fmt: skip
    assert [answer[0] for answer in answers] == ["HoldNotFound", "InvalidApiKey", "InvalidApiKey", "HoldNotFound"]


async def test_callers_who_leave_do_not_break_the_batch_they_were_in(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    (owner,) = plant(owner_conn, [1_000], [{}])
    batching = meter(db)
    for number in range(8):
        calls = [
            asyncio.create_task(batching.charge(SERVICE, owner, Ask(f"{number}.{n}", 1, None, None), Work(1)))
            for n in range(16)
        ]
        for _ in range(number):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers[1::2]} == {Charged}
    balance = owner_conn.execute("SELECT posted_nusd FROM account").fetchone()
    assert balance is not None
    assert 1_000 - 8 * 16 <= balance[0] <= 1_000 - 8 * 8


async def test_connections_killed_under_batches_lose_nothing_that_was_acknowledged(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    owners = plant(owner_conn, [1_000_000] * 10, [{}])
    batching = meter(db)
    acknowledged: set[str] = set()

    async def call(request_id: str, owner: KeyOwner) -> None:
        for _ in range(20):
            try:
                await batching.charge(SERVICE, owner, Ask(request_id, 3, None, None), Work(3))
            except DatabaseUnavailable:
                await asyncio.sleep(0.05)
            else:
                acknowledged.add(request_id)
                return

    async def kill() -> None:
        for _ in range(10):
            await asyncio.sleep(0.03)
            owner_conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE '%meter_charge%'"
            )

    waves = [asyncio.create_task(kill())]
    for number in range(2_000):
        waves.append(asyncio.create_task(call(f"k{number}", owners[number % 10])))
        if number % 100 == 0:
            await asyncio.sleep(0.01)
    await asyncio.gather(*waves)
    recorded = {row[0] for row in owner_conn.execute("SELECT request_id FROM usage").fetchall()}
    assert len(acknowledged) == 2_000
    assert recorded == acknowledged


async def test_without_a_database_every_call_is_refused_and_none_hangs() -> None:
    gone = Database("postgresql://nobody@127.0.0.1:1/none")
    await gone.open()
    batching, owner = meter(gone), KeyOwner(uuid.uuid4(), uuid.uuid4())
    try:
        async with asyncio.timeout(40):
            answers = await asyncio.gather(
                *(batching.authorize(SERVICE, owner, Ask(f"r{n}", 1, None, None)) for n in range(700)),
                return_exceptions=True,
            )
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    finally:
        await gone.close()


async def test_more_calls_than_a_worker_can_keep_are_refused_at_once(db: Database) -> None:
    decide = Batches(db).decider(function(), Numbered, Number)
    params = numbered()

    async def call() -> None:
        await decide(params)

    calls = [asyncio.create_task(call()) for _ in range(5_001)]
    await asyncio.sleep(0)
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert sum(isinstance(call.exception(), DatabaseUnavailable) for call in calls if call.done()) == 1
    for waiting in calls:
        waiting.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_many_calls_of_one_caller_wait_all_or_none(db: Database) -> None:
    decide = Batches(db).decider(function(), Numbered, Number)
    params = numbered()
    waiting = [asyncio.create_task(decide.many([params] * 500)) for _ in range(9)]
    waiting.append(asyncio.create_task(decide.many([params] * 400)))
    await asyncio.sleep(0)
    with pytest.raises(DatabaseUnavailable):
        await decide.many([params] * 101)
    waiting.append(asyncio.create_task(decide.many([params] * 100)))
    await asyncio.sleep(0)
    assert not any(each.done() for each in waiting)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("together", [True, False])
async def test_what_is_wrong_with_one_of_many_calls_hurts_no_other(db: Database, together: bool) -> None:
    decide = Batches(db, together=together).decider(FUNCTIONS["meter_extend"], ExtendParams, ExtendAnswer)
    captures: list[Any] = [0, 0, "none", 0]
    params = [ExtendParams(uuid.uuid4(), uuid.uuid4(), 1, captured) for captured in captures]
    answers = await decide.many([*params, params[0]])
    assert [type(each).__name__ for each in answers] == ["NoneType", "NoneType", "InvalidTextRepresentation", "NoneType", "NoneType"]  # fmt: skip
    assert await decide.many([]) == []


def through(lane: type[Lane]) -> Batches:
    """Batches that ask no database."""
    db = Database("postgresql://nobody@127.0.0.1:1/none")
    db.lane = lambda: lane(db._batches)  # type: ignore[method-assign]
    return Batches(db)


def call(decide: Any, number: int = 0) -> asyncio.Task[Any]:
    return asyncio.create_task(decide(numbered(number)))


class Numbered(CallParams, frozen=True):
    number: Any = 0


def numbered(number: Any = 0) -> Numbered:
    return Numbered(uuid.uuid4(), uuid.uuid4(), number)


def function() -> Function:
    takes = {"lock": "uuid[]", "wait": "boolean", "account_id": "uuid[]", "hold_id": "uuid[]", "number": "bigint[]"}
    return Function("f", "", "", takes, {"item": "bigint", "number": "bigint"})


class Number(CallAnswer, frozen=True):
    """Its item's, as these functions answer it."""

    number: int


def answered(item: int, place: int = 0, verbs: int = 1) -> tuple[Any, ...]:
    """A row of the verb in this place of so many."""
    return place, *(value for verb in range(verbs) for value in ([item, item] if verb == place else [None, None]))


@pytest.mark.parametrize(
    ("told", "answered_by"), [(ExtendParams, ReleaseAnswer), (CallParams, ExtendAnswer), (CallParams, Number)]
)
def test_a_verb_whose_function_says_otherwise_what_it_is_told_or_answers_does_not_start(
    told: type[CallParams], answered_by: type[CallAnswer]
) -> None:
    batches = through(Lane)
    with pytest.raises(AssertionError, match=r"^meter_release and "):
        batches.decider(FUNCTIONS["meter_release"], told, answered_by)
    assert batches.decider(FUNCTIONS["meter_release"], CallParams, ReleaseAnswer)


async def test_a_call_that_comes_while_the_connection_is_given_back_is_decided_too() -> None:
    closing, may_close = asyncio.Event(), asyncio.Event()

    class SlowToClose(Lane):
        async def all(self, _: str, __: Params) -> list[tuple[Any, ...]]:
            return [answered(1), answered(2)]

        async def close(self) -> None:
            closing.set()
            await may_close.wait()

    decide = through(SlowToClose).decider(function(), Numbered, Number)
    early = [call(decide), call(decide)]
    await closing.wait()
    late = [call(decide), call(decide)]
    await asyncio.sleep(0)
    may_close.set()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*early, *late) == [Number(1), Number(2)] * 2


async def test_a_call_that_waits_when_the_batches_are_stopped_is_refused() -> None:
    closing = asyncio.Event()

    class NeverCloses(Lane):
        async def all(self, _: str, __: Params) -> list[tuple[Any, ...]]:
            return [answered(1), answered(2)]

        async def close(self) -> None:
            closing.set()
            await asyncio.Event().wait()

    batches = through(NeverCloses)
    decide = batches.decider(function(), Numbered, Number)
    early = [call(decide), call(decide)]
    await closing.wait()
    late = call(decide)
    await asyncio.sleep(0)
    assert batches._deciding is not None
    batches._deciding.cancel()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*early) == [Number(1), Number(2)]
        with pytest.raises(DatabaseUnavailable):
            await late


async def test_a_connection_is_kept_from_statement_to_statement_for_a_while(
    db: Database, owner_conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken() -> int:
        return db._batches.get_stats().get("requests_num", 0)

    before, lane = taken(), db.lane()
    assert [await lane.all("SELECT %(n)s::int", {"n": n}) for n in range(3)] == [[(0,)], [(1,)], [(2,)]]
    assert taken() == before + 1
    with pytest.raises(psycopg.errors.DivisionByZero):
        await lane.all("SELECT 1 / %(n)s::int", {"n": 0})
    assert await lane.all("SELECT 1", {}) == [(1,)]
    assert taken() == before + 1, "a refused statement does no harm to the connection"
    await lane.close()
    monkeypatch.setattr("app.kernel.db._KEPT_SECONDS", -1.0)
    for _ in range(2):
        await lane.all("SELECT 1", {})
    assert taken() == before + 3
    monkeypatch.undo()
    [(pid,)] = await lane.all("SELECT pg_backend_pid()", {})
    owner_conn.execute("SELECT pg_terminate_backend(%s)", [pid])
    with pytest.raises(DatabaseUnavailable):
        await lane.all("SELECT 1", {})
    assert await lane.all("SELECT 1", {}) == [(1,)], "a broken one is replaced"
    await lane.close()
    await lane.close()


async def test_large_and_small_batches_do_not_take_turns() -> None:
    sizes, may_answer = [], asyncio.Semaphore(0)

    class Slow(Lane):
        async def all(self, _: str, params: Params) -> list[tuple[Any, ...]]:
            asked = [text.count(",") + 1 for name, text in params.items() if name.endswith("number")]
            sizes.append(sum(asked))
            await may_answer.acquire()
            width = len(asked)
            return [
                answered(item, place, width)
                for place, count in enumerate(asked) for item in range(1, count + 1)
            ]  # fmt: skip

    batches = through(Slow)
    first, second = (batches.decider(function(), Numbered, Number) for _ in range(2))
    calls = [call(first, n) for n in range(10)]
    while not sizes:
        await asyncio.sleep(0)
    calls += [call(first, n) for n in range(30)] + [call(second, n) for n in range(10)]
    await asyncio.sleep(0)
    for _ in range(3):
        may_answer.release()
    await asyncio.gather(*calls)
    assert sizes == [10, 26, 14], (
        "the ten that are about to call again, and forty that wait: 25 each, rounded up by verb"
    )


async def test_a_full_batch_is_made_ready_meanwhile_and_who_calls_alone_goes_along_with_it() -> None:
    """The database would wait for it otherwise; and a single call is not to wait for two batches of many."""
    sent, may_answer = list[Counter[str]](), asyncio.Semaphore(0)

    class Slow(Lane):
        async def all(self, _: str, params: Params) -> list[tuple[Any, ...]]:
            asked = {name: text.count(",") + 1 for name, text in params.items() if name.endswith("number")}
            sent.append(Counter(asked))
            await may_answer.acquire()
            width = len(asked)
            return [
                answered(item, place, width)
                for place, count in enumerate(asked.values()) for item in range(1, count + 1)
            ]  # fmt: skip

    batches = through(Slow)
    many, single = (batches.decider(function(), Numbered, Number) for _ in range(2))
    verb = batches._verbs[0]

    def of_many() -> asyncio.Task[Any]:
        params = [numbered(number) for number in range(500)]
        return asyncio.create_task(many.many(params))

    calls: list[asyncio.Task[Any]] = [of_many() for _ in range(4)]
    while verb.ready is None:
        await asyncio.sleep(0)
    assert sent == [{"0_number": 500}]
    assert (len(verb.ready[0]), len(verb.waiting), verb.left) == (500, 1_000, 1_500)
    calls.append(call(single))
    await asyncio.sleep(0)
    for _ in range(4):
        may_answer.release()
    answers = await asyncio.gather(*calls)
    assert sent == [{"0_number": 500}, {"0_number": 500, "1_number": 1}, {"0_number": 500}, {"0_number": 500}]
    assert answers == [*([Number(item) for item in range(1, 501)] for _ in range(4)), Number(1)]


async def test_what_was_ready_for_too_long_is_refused_and_the_rest_of_it_is_sent() -> None:
    may_answer, sizes = asyncio.Semaphore(0), list[int]()

    class Slow(Lane):
        async def all(self, _: str, params: Params) -> list[tuple[Any, ...]]:
            sizes.append(params["0_number"].count(",") + 1)
            await may_answer.acquire()
            return [answered(item) for item in range(1, sizes[-1] + 1)]

    batches = through(Slow)
    decide = batches.decider(function(), Numbered, Number)
    calls = [call(decide, number) for number in range(1_500)]
    while batches._verbs[0].ready is None:
        await asyncio.sleep(0)
    for each in batches._verbs[0].ready[0][:100]:
        each.asked.since -= 6
    for _ in range(3):
        may_answer.release()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert Counter(type(answer) for answer in answers) == {Number: 1_400, DatabaseUnavailable: 100}
    assert sizes == [500, 500, 400]


async def test_what_was_made_ready_when_the_batches_are_stopped_is_refused() -> None:
    class NeverAnswers(Lane):
        async def all(self, _: str, __: Params) -> list[tuple[Any, ...]]:
            await asyncio.Event().wait()
            raise AssertionError

    batches = through(NeverAnswers)
    decide = batches.decider(function(), Numbered, Number)
    calls = [call(decide, number) for number in range(1_700)]
    while batches._verbs[0].ready is None:
        await asyncio.sleep(0)
    assert batches._deciding is not None
    batches._deciding.cancel()
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert Counter(type(answer) for answer in answers) == {DatabaseUnavailable: 1_700}
    assert batches._verbs[0].left == 0


async def test_calls_that_cannot_be_written_down_are_told_so_and_no_other_verbs() -> None:
    """As they are made ready too, where no one waits for that to raise."""

    class Answers(Lane):
        async def all(self, _: str, params: Params) -> list[tuple[Any, ...]]:
            assert set(params) == {f"1_{name}" for name in ("lock", "wait", "account_id", "hold_id", "number")}
            return [answered(1)]

    batches = through(Answers)
    bad, good = (batches.decider(function(), Numbered, Number) for _ in range(2))
    no_text = [numbered("\ud800") for _ in range(3)]
    answers = await asyncio.gather(*map(bad, no_text), call(good), return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == [*["UnicodeEncodeError"] * 3, "Number"]
    assert batches._verbs[0].left == 0


# --- parameters ---------------------------------------------------------------------------------------

ODD = ["", "NULL", "null", '"', "\\", '\\"', "{}", ",", " a ", "a\nb\tc\x01\x7f", "é\u2028😀", "\\x00", "it's"]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("text", ODD),
        *(("text", [odd]) for odd in ODD),
        ("text", ["a", None, *ODD]),
        ("bigint", [0, -1, 2**63 - 1, None, -(2**63)]),
        ("uuid", [uuid.UUID(int=0), None, uuid.UUID(int=2**128 - 1)]),
        *(
            ("uuid", [uuid.UUID(int=number * 2**127 // count) for number in range(count)])
            for count in (1, 15, 16, 500, 70_000)
        ),
        ("timestamptz", [datetime(2026, 11, 26, 1, 2, 3, 456789, tzinfo=UTC), None, datetime(1970, 1, 1, tzinfo=UTC)]),
        ("bytea", [b"", b"\x00\xff\\"]),
        ("bytea", [b"", None, b"\x00\xff\\"]),
        ("jsonb", [{odd: odd} for odd in ODD]),
        ("jsonb", [None, *({odd: odd} for odd in ODD), {}, None, {"n": 1}]),
    ],
)
def test_postgresql_reads_an_array_as_what_was_written(
    owner_conn: psycopg.Connection[Any], kind: str, values: list[Any]
) -> None:
    owner_conn.execute("SET timezone = 'UTC'")
    told = "text[]::jsonb[]" if kind == "jsonb" else f"{kind}[]"
    assert owner_conn.execute(f"SELECT %s::{told}".encode(), [as_array(values)]).fetchone() == (values,)


def test_nothing_but_nulls_is_a_null_and_no_other_statement_to_prepare(clean: str) -> None:
    assert as_array([None, None]) is None
    with psycopg.connect(clean, autocommit=True, prepare_threshold=0) as conn:
        for values in ([1, None], [None, None], [None, 1]):
            found = conn.execute(
                "SELECT u.a, %(b)s::int[], (%(a)s::int[])[2] FROM unnest(%(a)s::int[], '{1,2}'::int[]) u (a, b)",
                {"a": as_array(values), "b": as_array([None])},
            ).fetchall()
            assert found == [(values[0], None, values[1]), (values[1], None, values[1])]
        assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (2,), "and this one"


# --- the functions ------------------------------------------------------------------------------------


async def test_one_call_with_another_keys_request_id_is_refused(
    db: Database, owner_conn: psycopg.Connection[Any]
) -> None:
    first, second = plant(owner_conn, [1_000], [{}, {}])
    await meter(db).authorize(SERVICE, first, Ask("r", 1, None, None))
    assert (await outcome(meter(db).authorize(SERVICE, second, Ask("r", 1, None, None))))[0] == "RequestIdReuse"


def test_the_functions_of_the_database_are_those_of_the_file_and_only_the_service_may_call_them(
    owner_conn: psycopg.Connection[Any],
) -> None:
    text = (Path(__file__).parents[1] / "app/metering/functions.sql").read_text()
    assert len(FUNCTIONS) == text.count("CREATE OR REPLACE FUNCTION ")
    found = owner_conn.execute(
        """SELECT proname, prosrc, has_function_privilege('satmeter_runtime', oid, 'EXECUTE'),
                  EXISTS (SELECT FROM aclexplode(proacl) WHERE grantee = 0)
           FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1"""
    ).fetchall()
    assert found == [(name, FUNCTIONS[name].body, True, False) for name in sorted(FUNCTIONS)]


def test_a_function_that_is_not_the_files_is_told_and_put_right(
    clean: str, owner_conn: psycopg.Connection[Any]
) -> None:
    check(clean)
    for planted in (
        "CREATE FUNCTION meter_other() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE OR REPLACE FUNCTION meter_lock(p_lock uuid[], p_wait boolean) RETURNS uuid[] LANGUAGE sql AS 'SELECT p_lock'",
        "DROP FUNCTION meter_expire",
        "COMMENT ON FUNCTION meter_charge IS 'of an earlier version'",
    ):
        owner_conn.execute(planted.encode())
        with pytest.raises(MigrationError, match="app migrate"):
            check(clean)
        assert migrate(clean)
        check(clean)
    assert not migrate(clean)
