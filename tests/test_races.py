"""Any two verbs at once on one hold or one request_id: no failure of ours, no call charged twice or for nothing, clean books."""

import asyncio
import itertools
import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import httpx
import psycopg
import pytest

from app.audit import audit
from app.kernel.db import Database, new_id
from app.kernel.errors import AppError
from app.kernel.security import Pepper, Sealer
from app.keys.issue import Keyring, change, revoke
from app.keys.verify import KeyOwner
from app.ledger.charge import ChargeId
from app.metering.functions import FUNCTIONS
from app.metering.holds import Ask, Charged, Held, Meter, Work, expire_holds
from app.metering.refund import Refunded, refund
from tests.program import installation
from tests.rig import reported

PEPPER: Final = Pepper(b"a pepper for tests, of 32 bytes and more")
KEYRING: Final = Keyring(PEPPER, Sealer([("test", bytes(32))]), reveal=False)
SERVICE: Final = "proxy"
HELD_NUSD, CAPTURED_NUSD, COST_NUSD, BALANCE_NUSD = 1_000, 3_000, 500, 10**9
AT_ONCE: Final = 40
OF_A_PAIR: Final = int(os.environ.get("RACES_OF_A_PAIR", "200"))


@dataclass(slots=True)
class Race:
    """Two verbs and what they meet, on an account of their own; what each was answered, and what a late settle was."""

    verbs: tuple[str, str]
    state: str
    owner: KeyOwner
    differs: bool
    """Whether two creators ask for different things under their request_id."""
    dies: bool
    """Whether the proxy of what is still open is never heard of again, before it settles after all."""
    hold_id: str = ""
    charge_id: str = ""
    answers: list[Any] = field(default_factory=list)
    closing: Charged | None = None

    def named(self) -> list[str]:
        return [name_of(answer) for answer in self.answers]

    def __str__(self) -> str:
        return f"{' × '.join(self.verbs)} on {self.state}: {self.answers}"


@dataclass(frozen=True, slots=True)
class Side:
    """A process that asks: its meter, and its database; and that database as its owner sees it."""

    meter: Meter
    db: Database
    owner: Database


# --- the verbs, and what they may meet ------------------------------------------------------------------

Verb = Callable[[Side, Race, int], Awaitable[Any]]


def authorize(side: Side, race: Race, place: int) -> Awaitable[Any]:
    amount_nusd = HELD_NUSD + (place if race.differs and race.state == "nothing" else 0)
    return side.meter.authorize(SERVICE, race.owner, Ask("r", amount_nusd, None, None))


def charge(side: Side, race: Race, place: int) -> Awaitable[Any]:
    cost_nusd = COST_NUSD + place * race.differs
    return side.meter.charge(SERVICE, race.owner, Ask("r", cost_nusd, None, None), Work(cost_nusd))


def event(side: Side, race: Race, place: int) -> Awaitable[Any]:
    cost_nusd = COST_NUSD + place * race.differs
    return reported(side.meter, SERVICE, race.owner, Ask("r", cost_nusd, None, None), Work(cost_nusd))


def settle(side: Side, race: Race, place: int) -> Awaitable[Any]:
    return side.meter.settle(SERVICE, race.hold_id, Work(COST_NUSD + place, at_least_the_hold=race.differs))


def release(side: Side, race: Race, _: int) -> Awaitable[Any]:
    return side.meter.release(SERVICE, race.hold_id)


def extend(side: Side, race: Race, _: int) -> Awaitable[Any]:
    return side.meter.extend(SERVICE, race.hold_id, 60, 0)


def capture(side: Side, race: Race, place: int) -> Awaitable[Any]:
    return side.meter.extend(SERVICE, race.hold_id, 60, CAPTURED_NUSD + place)


def expire(side: Side, race: Race, _: int) -> Awaitable[Any]:
    params = {"lock": [race.owner.account_id], "wait": race.differs, "charge_id": [new_id()]}
    return side.db.one(f"SELECT * FROM {FUNCTIONS['meter_expire'].call()}", params)


def give_back(side: Side, race: Race, _: int) -> Awaitable[Any]:
    return refund(side.db, SERVICE, race.charge_id, None)


def patch(side: Side, race: Race, place: int) -> Awaitable[Any]:
    period = random.choice(("day", "week", "month"))
    changes = {"limit_nusd": HELD_NUSD // 2 + place, "reset_period": period if race.differs else None}
    return side.db.transaction(
        lambda session: change(session, KEYRING, race.owner.account_id, race.owner.key_id, changes)
    )


def revoke_key(side: Side, race: Race, _: int) -> Awaitable[Any]:
    return side.db.transaction(lambda session: revoke(session, KEYRING, race.owner.account_id, race.owner.key_id))


def freeze(side: Side, race: Race, _: int) -> Awaitable[Any]:
    """As the database's owner does it: the service may not."""
    return side.owner.one(
        "UPDATE account SET status = 'frozen' WHERE id = %(id)s RETURNING status", {"id": race.owner.account_id}
    )


VERBS: Final[dict[str, Verb]] = {
    "authorize": authorize, "charge": charge, "event": event, "settle": settle, "release": release, "extend": extend,
    "capture": capture, "expire": expire, "refund": give_back, "PATCH": patch, "revoke": revoke_key, "freeze": freeze,
}  # fmt: skip
CREATORS: Final = ("authorize", "charge", "event")
STATES: Final = ("nothing", "open", "overdue", "captured", "overdue capture", "settled")
NEED_A_HOLD: Final = ("settle", "release", "extend", "capture")
BY_OPERATORS: Final = ("PATCH", "revoke", "freeze")
PAIRS: Final = list(itertools.combinations_with_replacement(VERBS, 2))

_REFUSED: Final = {"InvalidApiKey", "AccountFrozen", "KeyLimitExceeded", "FundsHeld"}
MAY_ANSWER: Final[dict[str, set[str]]] = {
    "authorize": {"Held", "RequestIdReuse", "HoldClosed"}, "charge": {"Charged", "RequestIdReuse"},
    "event": {"Charged", "RequestIdReuse"}, "settle": {"Charged"}, "release": {"done", "HoldClosed", "HoldCaptured"},
    "extend": {"done", "HoldClosed"}, "capture": {"done", "HoldClosed"}, "expire": {"done"}, "refund": {"Refunded"},
    "PATCH": {"done", "KeyNotFound"}, "revoke": {"done", "KeyNotFound"}, "freeze": {"done"},
}  # fmt: skip


def states_of(pair: tuple[str, str]) -> list[str]:
    if "refund" in pair:
        return ["settled"]
    there = [state for state in STATES if state != "nothing"]
    if any(verb in NEED_A_HOLD for verb in pair):
        return there
    return [each for state in there for each in ("nothing", state)] if set(pair) <= set(CREATORS) else list(STATES)


def name_of(answer: Any) -> str:
    if isinstance(answer, Held | Charged | Refunded | BaseException):
        return type(answer).__name__
    return "done"


# --- running them ---------------------------------------------------------------------------------------


async def run(sides: Sequence[Side], conn: psycopg.Connection[Any], count: int) -> list[Race]:
    """Each pair `count` times, whatever it may meet in turn; then what is still open dies or is settled."""
    choice, wanted = random.Random(count), list(itertools.product(PAIRS, range(count)))
    races = [
        Race(pair, states_of(pair)[number % len(states_of(pair))], owner, choice.random() < 0.5, choice.random() < 0.5)
        for (pair, number), owner in zip(wanted, plant(conn, len(wanted)), strict=True)
    ]
    choice.shuffle(races)
    await all_at_once(races, partial(prepared, sides[0]))
    lapse(conn, [race for race in races if race.state.startswith("overdue")])
    await all_at_once(races, partial(raced, sides))
    lapse(conn, [race for race in races if race.dies])
    await expire_holds(sides[0].db)
    told = conn.execute("SELECT account_id, state, captured_nusd FROM hold WHERE state <> 'settled'").fetchall()
    left = {account_id: (state, captured_nusd) for account_id, state, captured_nusd in told}
    for race in races:
        state, captured_nusd = left.get(race.owner.account_id, ("settled", 0))
        assert captured_nusd == 0 or (state == "open" and not race.dies), ("what was captured is spent", race)
    await all_at_once(races, partial(closed, sides[-1]))
    return races


async def all_at_once(races: Sequence[Race], act: Callable[[Race], Awaitable[None]]) -> None:
    """Many accounts at a time, so that batches are full."""
    waiting = iter(races)

    async def work() -> None:
        for race in waiting:
            await act(race)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def prepared(side: Side, race: Race) -> None:
    if race.state == "nothing":
        return
    held = await side.meter.authorize(SERVICE, race.owner, Ask("r", HELD_NUSD, None, None))
    race.hold_id = held.hold_id
    if race.state.endswith(("captured", "capture")):
        await side.meter.extend(SERVICE, held.hold_id, 60, CAPTURED_NUSD - 1_000)
    if race.state == "settled":
        charged = await side.meter.settle(SERVICE, held.hold_id, Work(COST_NUSD))
        race.charge_id = str(ChargeId(race.owner.account_id, charged.charge_id))


async def raced(sides: Sequence[Side], race: Race) -> None:
    asked = [VERBS[verb](sides[place % len(sides)], race, place) for place, verb in enumerate(race.verbs)]
    race.answers = await asyncio.gather(*asked, return_exceptions=True)


async def closed(side: Side, race: Race) -> None:
    """Whoever was given a hold tells in the end what it cost."""
    held = next((answer.hold_id for answer in race.answers if isinstance(answer, Held)), race.hold_id)
    if held:
        race.closing = await side.meter.settle(SERVICE, held, Work(7))


def lapse(conn: psycopg.Connection[Any], races: Sequence[Race]) -> None:
    conn.execute(
        "UPDATE hold SET expires_at = now() - interval '1 second' WHERE state = 'open' AND account_id = ANY (%s)",
        [[race.owner.account_id for race in races]],
    )


def plant(conn: psycopg.Connection[Any], count: int) -> list[KeyOwner]:
    """Accounts with money and a key each, all in a few statements."""
    accounts, keys = [uuid.uuid4() for _ in range(count)], [uuid.uuid4() for _ in range(count)]
    conn.execute(
        "INSERT INTO account (id, posted_nusd, entry_count) SELECT unnest(%s::uuid[]), %s, 1", [accounts, BALANCE_NUSD]
    )
    conn.execute(
        """INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
           SELECT a, 1, 'adjustment', 'act/' || a, 'adjustment', %s, %s FROM unnest(%s::uuid[]) a""",
        [BALANCE_NUSD, BALANCE_NUSD, accounts],
    )
    conn.execute(
        """INSERT INTO admin_log (id, admin, act, subject, amount_nusd)
           SELECT a, 'test', 'account.adjust', a::text, %s FROM unnest(%s::uuid[]) a""",
        [BALANCE_NUSD, accounts],
    )
    conn.execute(
        "INSERT INTO api_key (account_id, id, name, preview) SELECT unnest(%s::uuid[]), unnest(%s::uuid[]), 'key', 'sk-'",
        [accounts, keys],
    )
    conn.execute(
        """INSERT INTO credential (secret_hash, kind, account_id, key_id)
           SELECT sha256(convert_to(a::text, 'UTF8')), 'credit_id', a, NULL FROM unnest(%s::uuid[]) a UNION ALL
           SELECT sha256(convert_to(k::text, 'UTF8')), 'api_key', a, k FROM unnest(%s::uuid[], %s::uuid[]) u (a, k)""",
        [accounts, accounts, keys],
    )
    return [KeyOwner(*ids) for ids in zip(accounts, keys, strict=True)]


# --- what must be so, whoever came first ------------------------------------------------------------------


def check(race: Race, charges: Sequence[uuid.UUID]) -> None:
    """`charges` are those of the books."""
    refused = _REFUSED if any(verb in BY_OPERATORS for verb in race.verbs) else set()
    for verb, answer in zip(race.verbs, race.named(), strict=True):
        assert answer in MAY_ANSWER[verb] | (refused if verb in ("authorize", "charge") else set()), race
    told = [answer for answer in (*race.answers, race.closing) if isinstance(answer, Charged)]
    assert {answer.charge_id for answer in told} <= set(charges), ("a charge that was told is lost", race)
    assert len(charges) <= 1, ("charged twice", race)
    if race.closing is not None or "settle" in race.verbs or race.state == "settled":
        assert len(charges) == 1, ("a settle always charges", race)
    assert len({answer.cost_nusd for answer in told}) <= 1, ("a repeat has the answer of the first", race)
    check_creators(race)
    if "release" in race.verbs:
        check_release(race)


def check_creators(race: Race) -> None:
    """One of two under a request_id made it, and the other repeats it or is refused."""
    answers = list(zip(race.verbs, race.answers, strict=True))
    if race.state != "nothing":
        assert not any(verb in ("charge", "event") and isinstance(answer, Charged) for verb, answer in answers), race
        may_live = race.state in ("open", "captured") or any(verb in ("extend", "capture") for verb in race.verbs)
        for answer in race.answers:
            assert not isinstance(answer, Held) or (answer.is_repeat and may_live and race.state != "settled"), race
        return
    if not all(verb in CREATORS for verb in race.verbs):
        return
    if race.differs or len(set(race.verbs)) == 2:
        assert race.named().count("RequestIdReuse") == 1, race
    else:
        assert "RequestIdReuse" not in race.named(), race
        assert len({getattr(answer, "charge_id", None) or answer.hold_id for answer in race.answers}) == 1, race


def check_release(race: Race) -> None:
    """What was captured is spent, and not given back."""
    answers = dict(zip(race.verbs, race.named(), strict=True))
    if race.state.endswith(("captured", "capture")):
        assert answers["release"] in ("HoldCaptured", "HoldClosed"), race
    if "capture" in answers:
        assert (answers["release"], answers["capture"]) != ("done", "done"), race


async def show(sides: Sequence[Side], conn: psycopg.Connection[Any], count: int) -> None:
    races = await run(sides, conn, count)
    charges: dict[uuid.UUID, list[uuid.UUID]] = {}
    for account_id, charge_id in conn.execute("SELECT account_id, id FROM usage").fetchall():
        charges.setdefault(account_id, []).append(charge_id)
    broken = Counter(
        (race.verbs, repr(answer))
        for race in races for answer in race.answers
        if isinstance(answer, BaseException) and (not isinstance(answer, AppError) or answer.status >= 500)
    )  # fmt: skip
    assert broken == {}
    for race in races:
        check(race, charges.get(race.owner.account_id, []))
    assert conn.execute("SELECT count(*) FROM hold WHERE state = 'open'").fetchone() == (0,)
    assert conn.execute("SELECT count(*) FROM account WHERE held_nusd <> 0").fetchone() == (0,)
    report = await audit(sides[0].db)
    assert report.is_clean, report.findings
    counted = Counter(
        f"{verb} {answer}" for race in races for verb, answer in zip(race.verbs, race.named(), strict=True)
    )
    print(
        f"\n{len(races)} races of {len(PAIRS)} pairs, {sum(map(len, charges.values()))} charges, 0 twice, 0 lost, 0 of 5xx:"
        f" {dict(sorted(counted.items()))}",
        end="",
    )


@asynccontextmanager
async def processes(url: str, setup: Sequence[Mapping[str, bool]]) -> AsyncIterator[list[Side]]:
    """As many as there are in `setup`, each with what its meter is told."""
    async with AsyncExitStack() as stack:
        sides = []
        owner = Database(url, pool_size=4, role=None)
        await owner.open()
        stack.push_async_callback(owner.close)
        for told in setup:
            db = Database(url, pool_size=10)
            await db.open()
            stack.push_async_callback(db.close)
            sides.append(Side(Meter(db, PEPPER, **{**TOGETHER, **told}), db, owner))
        yield sides


TOGETHER: Final = {"batch": True, "hold_sync_commit": True}
SETUPS: Final[dict[str, Sequence[Mapping[str, bool]]]] = {
    "a process": [{}], "two processes": [{}, {}], "one by one": [{"batch": False}] * 2
}  # fmt: skip
TWO_LANES: Final[Sequence[Mapping[str, bool]]] = [{"hold_sync_commit": False}]
"""Holds have batches of their own then, beside those of all other verbs."""


@pytest.mark.long
@pytest.mark.parametrize("setup", [*SETUPS.values(), TWO_LANES], ids=[*SETUPS, "two batches of a process"])
async def test_every_pair_of_verbs_at_once_leaves_no_failure_and_no_charge_twice_or_lost(
    clean: str, owner_conn: psycopg.Connection[Any], setup: Sequence[Mapping[str, bool]]
) -> None:
    async with processes(clean, setup) as sides:
        await show(sides, owner_conn, 6)


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
async def test_hundreds_of_every_pair_of_verbs_leave_no_failure_and_no_charge_twice_or_lost(
    clean: str, owner_conn: psycopg.Connection[Any], setup: Sequence[Mapping[str, bool]]
) -> None:
    async with processes(clean, setup) as sides:
        await show(sides, owner_conn, OF_A_PAIR)


# --- two processes of the program, over HTTP --------------------------------------------------------------

ON_THE_WIRE: Final = ("authorize", "charge", "settle", "release", "extend", "capture", "refund", "PATCH")


@dataclass(slots=True)
class Wire:
    """A customer's proxy and their owner, over as many connections as are wanted, so that both processes answer."""

    client: httpx.AsyncClient
    demo: dict[str, str]
    key_id: str

    async def ask(self, verb: str, request_id: str, hold_id: str, charge_id: str) -> httpx.Response:
        key = {"request_id": request_id, "api_key": self.demo["api_key"]}
        if verb == "PATCH":
            owner = {"x-credit-id": self.demo["credit_id"]}
            return await self.client.patch(f"/keys/{self.key_id}", headers=owner, json={"usage_limit_usd": 1000})
        path, body = {
            "authorize": ("authorize", key | {"max_cost_usd": "0.0001"}),
            "charge": ("charge", key | {"cost_usd": "0.00005"}),
            "settle": ("settle", {"hold_id": hold_id, "cost_usd": "0.00005"}),
            "release": ("release", {"hold_id": hold_id}),
            "extend": ("extend", {"hold_id": hold_id}),
            "capture": ("extend", {"hold_id": hold_id, "captured_usd": "0.0003"}),
            "refund": ("refund", {"charge_id": charge_id}),
        }[verb]
        headers = {"Authorization": f"Bearer {self.demo['service_token']}"}
        return await self.client.post(f"/v1/meter/{path}", headers=headers, json=body)

    async def race(self, pair: tuple[str, str], request_id: str) -> list[tuple[str, httpx.Response]]:
        hold_id = charge_id = ""
        if not set(pair) <= {"authorize", "charge", "PATCH"}:
            hold_id = (await self.ask("authorize", request_id, "", "")).json()["hold_id"]
        if "refund" in pair:
            charge_id = (await self.ask("settle", request_id, hold_id, "")).json()["charge_id"]
        answers = await asyncio.gather(*(self.ask(verb, request_id, hold_id, charge_id) for verb in pair))
        told = [answer.json() for answer in answers]
        held = hold_id or next((each["hold_id"] for each in told if "hold_id" in each), "")
        closing = [("settle", await self.ask("settle", request_id, held, ""))] if held else []
        return [*zip(pair, answers, strict=True), *closing]


@pytest.mark.long
async def test_two_processes_of_the_program_answer_every_pair_without_a_failure_and_charge_once() -> None:
    with installation(WORKERS="2") as program:
        await asyncio.to_thread(program.run)
        demo = await asyncio.to_thread(program.answer, "demo")
        pairs = list(itertools.combinations_with_replacement(ON_THE_WIRE, 2))
        async with httpx.AsyncClient(base_url=demo["base_url"], timeout=20, trust_env=False) as client:
            keys = await client.get("/keys", headers={"x-credit-id": demo["credit_id"]})
            wire = Wire(client, demo, keys.json()["data"][0]["_id"])
            counted, reused = Counter[str](), 0
            for turn in range(3):
                races = await asyncio.gather(*(wire.race(pair, f"r{turn}.{n}") for n, pair in enumerate(pairs)))
                for pair, race in zip(pairs, races, strict=True):
                    counted.update(f"{verb} {answer.status_code}" for verb, answer in race)
                    assert all(answer.status_code in (200, 409) for _, answer in race), [
                        answer.text for _, answer in race
                    ]
                    assert all(
                        answer.status_code == 200 for verb, answer in race if verb in ("settle", "refund", "PATCH")
                    )
                    charges = {
                        answer.json()["charge_id"]
                        for verb, answer in race
                        if verb in ("settle", "charge") and answer.status_code == 200
                    }
                    assert len(charges) <= 1, [answer.text for _, answer in race]
                    reused += pair == ("authorize", "charge") and [answer.status_code for _, answer in race[:2]].count(
                        409
                    )
        assert reused == 3, "one of authorize and charge is refused, each time"
        assert len(program.children("http")) == 2
        assert program.sql("SELECT count(*) FROM hold WHERE state = 'open'") == [(0,)]
        assert program.sql(
            "SELECT count(*) FROM (SELECT request_id FROM usage GROUP BY 1 HAVING count(*) > 1) twice"
        ) == [(0,)]
        report = await asyncio.to_thread(program.answer, "audit")
        assert report["findings"] == []
        print(f"\n{3 * len(pairs)} races through two processes: {dict(sorted(counted.items()))}", end="")
        assert "Traceback" not in program.printed + program.logged
        assert program.interrupt() == 0
