"""Days of calls: exact under traffic, whole at every moment, and the same however often they are summed."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
from sqlalchemy.ext.asyncio import AsyncSession

from app.activity.archive import make_partitions
from app.activity.calendar import first_id
from app.activity.rollup import keep_up, rebuild, roll_up
from app.activity.summed import SUMS, lines
from app.audit import audit
from app.kernel.db import Row, rows
from app.ledger.charge import ChargeId
from tests.activity.conftest import Past
from tests.rig import Customer

D = Decimal
TODAY = datetime.now(UTC).date


def days_ago(days: int) -> str:
    return str(TODAY() - timedelta(days=days))


async def some_calls(past: Past, customer: Customer, key: str = "") -> None:
    for model, usd, tokens in (("a", "0.01", 10), ("b", "0.002", 7), ("a", "0.0000003", 5)):
        await past.charge(customer, usd, key, model=model, usage={"input_tokens": tokens, "output_tokens": 1})


def in_all(answer: Any) -> dict[str, Any]:
    lines = answer["data"]
    return {
        name: sum(line[name] for line in lines) for name in ("requests", "input_tokens", "output_tokens", "cost_usd")
    }


async def test_today_is_in_the_answer_without_any_job(past: Past) -> None:
    customer = await past.rig.customer("10")
    await some_calls(past, customer)
    answer = await past.ask("/activity", customer)
    key_id = (await past.ask("/keys", customer))["data"][0]["_id"]
    same = {"day": days_ago(0), "api_key_id": key_id, "refunded_usd": 0}
    assert answer == {
        "data": [
            {**same, "model": "a", "requests": 2, "input_tokens": 15, "output_tokens": 2, "cost_usd": D("0.0100003")},
            {**same, "model": "b", "requests": 1, "input_tokens": 7, "output_tokens": 1, "cost_usd": D("0.002")},
        ],
        "next_cursor": None,
    }
    assert past.kept() == []


async def test_calls_are_summed_and_the_answer_stays_the_same(past: Past) -> None:
    customer = await past.rig.customer("10")
    other = await past.rig.new_key(customer)
    for days in (40, 2, 1, 0):
        await some_calls(past, customer, other["api_key"] if days == 2 else "")
        before = days
        if before:
            await past.back({40: 38, 2: 1, 1: 1}[days])
    answers = await past.ask("/activity", customer)
    assert [line["day"] for line in answers["data"]] == [days_ago(n) for n in (0, 0, 1, 1, 2, 2, 40, 40)]
    assert await past.roll_up() > 12
    assert await past.ask("/activity", customer) == answers
    assert len(past.kept()) == 8
    assert past.kept() == past.fresh()
    assert await past.roll_up() == 0


async def test_what_was_called_just_now_is_summed_without_a_look_at_other_accounts(past: Past) -> None:
    customer, other = await past.rig.customer("10"), await past.rig.customer("10")
    await past.charge(other, "0.25", model="c")
    await past.back(1)
    await some_calls(past, customer)
    assert await keep_up(past.rig.house.db, worth_entries=50) == 0  # so few are looked at by who reads
    assert await keep_up(past.rig.house.db) >= 3
    assert await keep_up(past.rig.house.db) == 0
    assert sum(line[4] for line in past.kept()) == 3
    assert in_all(await past.ask("/activity", other))["requests"] == 1
    assert await past.roll_up() >= 1
    assert past.kept() == past.fresh()


async def test_no_plan_is_kept_that_was_made_when_there_were_no_calls(past: Past) -> None:
    """On a first day, and in a month's first minute, what joins entries with calls was planned for none."""

    async def kept(session: AsyncSession) -> list[Row]:
        for _ in range(
            12
        ):  # the driver prepares what it is asked often, and the server keeps a plan of what is prepared
            await rows(session, "SELECT id FROM usage WHERE outcome = :outcome", outcome="completed")
        return await rows(session, "SELECT statement FROM pg_prepared_statements")

    assert await past.rig.house.db.transaction(kept) == []


async def test_days_are_the_sum_of_usage_in_every_snapshot_whatever_was_summed_when(past: Past) -> None:
    """Calls and refunds, some of them uncommitted while others are summed, some with ids of other days; jobs of several processes,
    rebuilds; and readers who compare all the while."""
    seed = random.SystemRandom().randrange(10**9)
    dice, customers = random.Random(seed), [await past.rig.customer("100") for _ in range(3)]
    db, made, compared = past.rig.house.db, asyncio.Event(), 0

    async def call(number: int) -> None:
        await asyncio.sleep(dice.random())
        told = await past.charge(
            customers[number % 3], f"0.{dice.randrange(1, 999):06}", request_id=f"race-{number}", model=f"m{number % 4}",
            provider=f"p{number % 2}", usage={"input_tokens": number, "reasoning_tokens": number % 5},
        )  # fmt: skip
        if number % 5 == 0:
            await asyncio.sleep(dice.random() / 3)
            assert (await past.rig.meter("refund", charge_id=told["charge_id"])).status_code == 200

    async def slow_call(number: int) -> None:
        """In a transaction that is open for a while, with an id of some other day."""
        await asyncio.sleep(dice.random())
        async with await psycopg.AsyncConnection.connect(past.rig.database_url) as conn:
            day = datetime.now(UTC) + timedelta(days=dice.choice((-40, -1, 0, 1)))
            await conn.execute(ONE_CALL, [f"slow-{number}", first_id(day).hex[:12]])
            await asyncio.sleep(dice.random() / 2)
            await (conn.rollback() if number % 4 == 0 else conn.commit())

    async def sum_up() -> None:
        while not made.is_set():
            await dice.choice((keep_up, roll_up, roll_up, rebuild))(db)
            await asyncio.sleep(dice.random() / 20)

    async def look() -> None:
        nonlocal compared
        while not made.is_set():
            assert await db.transaction(differences) == [], f"seed {seed}"
            compared += 1
            await asyncio.sleep(dice.random() / 20)

    async def act() -> None:
        await asyncio.gather(*(call(n) for n in range(60)), *(slow_call(n) for n in range(12)))
        made.set()

    await asyncio.gather(act(), sum_up(), sum_up(), look(), look())
    assert compared > 2
    await roll_up(db)
    assert await db.transaction(differences) == []
    assert past.kept() == past.fresh()
    assert sum(line[4] for line in past.kept()) == 60 + 9
    assert (await audit(db)).findings == ()


ONE_CALL = """
    SELECT c.* FROM account a JOIN LATERAL (SELECT * FROM api_key WHERE account_id = a.id LIMIT 1) k ON true,
    meter_charge(ARRAY[a.id], true, ARRAY[a.id], ARRAY[k.id], ARRAY[gen_random_uuid()], ARRAY['proxy'], ARRAY[%s], NULL, NULL, NULL, NULL,
                 ARRAY[(%s || right(translate(gen_random_uuid()::text, '-', ''), 20))::uuid], ARRAY[1000]::bigint[], NULL,
                 ARRAY['completed'], ARRAY['m'], NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, ARRAY['']) c
    WHERE a.id = (SELECT id FROM account ORDER BY random() LIMIT 1)"""


async def differences(session: AsyncSession) -> list[Row]:
    """What readers are told of all accounts' calls, and what the plainest of words say, where they differ; in one snapshot."""
    await rows(session, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    return await rows(
        session,
        f"""SELECT * FROM (SELECT account_id, day, key_id, model, served_model, provider, {SUMS} FROM ({lines(of_all=True)}) x
                           GROUP BY 1, 2, 3, 4, 5, 6) told
            FULL JOIN (
                SELECT u.account_id, (to_timestamp(('x' || translate(left(u.id::text, 13), '-', ''))::bit(48)::bigint / 1000.0) AT TIME ZONE 'UTC')::date AS day,
                       u.key_id, coalesce(u.model, '') AS model, coalesce(u.served_model, u.model, '') AS served_model,
                       coalesce(u.provider, '') AS provider, count(*) AS requests, sum(u.cost_nusd) AS cost_nusd,
                       sum(coalesce((u.units->>'reasoning_tokens')::bigint, 0)) AS reasoning_tokens,
                       sum(coalesce((SELECT amount_nusd FROM entry e WHERE e.kind = 'refund' AND e.reference = u.id::text), 0)) AS refunded_nusd
                FROM usage u GROUP BY 1, 2, 3, 4, 5, 6) plain USING (account_id, day, key_id, model, served_model, provider)
            WHERE (told.requests, told.cost_nusd, told.reasoning_tokens, told.refunded_nusd)
                  IS DISTINCT FROM (plain.requests, plain.cost_nusd, plain.reasoning_tokens, plain.refunded_nusd)""",
    )


async def test_a_call_with_the_id_of_a_day_that_is_summed_counts_to_it_at_once(past: Past) -> None:
    customer = await past.rig.customer("10")
    await some_calls(past, customer)
    await past.back(1)
    await past.roll_up()
    yesterday = first_id(datetime.now(UTC) - timedelta(days=1)).hex[:12]
    past.rig.sql(ONE_CALL, "late", yesterday)
    assert in_all(await past.ask("/activity", customer, to=days_ago(1))) == {
        "requests": 4, "input_tokens": 22, "output_tokens": 3, "cost_usd": D("0.0120013")
    }  # fmt: skip
    await past.roll_up()
    assert past.kept() == past.fresh()
    assert (await audit(past.rig.house.db)).is_clean


async def test_a_refund_counts_to_the_day_of_its_call_however_late(past: Past) -> None:
    customer = await past.rig.customer("10")
    made = await past.charge(customer, "0.5", model="a")
    await past.rig.meter("refund", charge_id=made["charge_id"], amount_usd="0.1")
    assert (await past.ask("/activity", customer))["data"][0]["refunded_usd"] == D("0.1")
    second = await past.charge(customer, "0.25", model="a")
    await past.back(9)
    await past.roll_up()
    [(call_id,)] = past.rig.sql("SELECT id FROM usage WHERE cost_nusd = 250000000")
    [(account_id,)] = past.rig.sql("SELECT id FROM account")
    assert second["charge_id"] != str(ChargeId(account_id, call_id))
    refund = await past.rig.meter("refund", charge_id=str(ChargeId(account_id, call_id)))
    assert refund.status_code == 200
    assert (await past.ask("/activity", customer))["data"][0]["refunded_usd"] == D("0.35")  # at once
    await asyncio.gather(*(past.roll_up() for _ in range(3)))
    [line] = (await past.ask("/activity", customer))["data"]
    assert (line["day"], line["cost_usd"], line["refunded_usd"]) == (days_ago(9), D("0.75"), D("0.35"))
    assert past.kept() == past.fresh()


async def test_rebuild_makes_every_day_what_its_calls_say(past: Past) -> None:
    customer, other = await past.rig.customer("10"), await past.rig.customer("10")
    await some_calls(past, customer)
    await past.back(70)
    await some_calls(past, other)
    await past.back(1)
    await past.roll_up()
    right = past.kept()
    assert right == past.fresh()
    past.rig.sql("UPDATE usage_day SET cost_nusd = cost_nusd + 1, requests = 9 WHERE model = 'a'")
    past.rig.sql(
        "DELETE FROM usage_day WHERE model = 'b' AND account_id = (SELECT min(account_id::text)::uuid FROM usage_day)"
    )
    past.rig.sql(
        "INSERT INTO usage_day SELECT account_id, day, gen_random_uuid(), 'x', 1, 1, 1, 1, 0 FROM usage_day LIMIT 1"
    )
    assert not (await audit(past.rig.house.db)).is_clean
    assert await rebuild(past.rig.house.db) == 4
    assert past.kept() == right
    assert await rebuild(past.rig.house.db) == 0


async def test_pages_of_days_lose_none_and_filters_hold_for_summed_and_open_days(past: Past) -> None:
    customer = await past.rig.customer("10")
    keys = [(await past.rig.new_key(customer))["api_key"] for _ in range(2)]
    for days in range(3):
        for key in keys:
            await some_calls(past, customer, key)
        if days < 2:
            await past.back(1)
    await past.roll_up()
    whole = (await past.ask("/activity", customer, limit=100))["data"]
    assert len(whole) == 3 * 2 * 2
    seen: list[Any] = []
    cursor: str | None = None
    while cursor is not None or not seen:
        page = await past.ask("/activity", customer, limit=5, **({"cursor": cursor} if cursor else {}))
        seen, cursor = seen + page["data"], page["next_cursor"]
    assert seen == whole
    some = await past.ask("/activity", customer, **{"from": days_ago(1), "to": days_ago(1), "model": "b"})
    assert [(line["day"], line["model"]) for line in some["data"]] == [(days_ago(1), "b")] * 2
    some = await past.ask("/activity", customer, api_key_id=whole[0]["api_key_id"], **{"from": days_ago(1)})
    assert [
        line for line in whole if line["api_key_id"] == whole[0]["api_key_id"] and line["day"] >= days_ago(1)
    ] == some["data"]


async def test_history_adds_up_to_activity(past: Past) -> None:
    customer = await past.rig.customer("10")
    await some_calls(past, customer)
    await past.back(1)
    await some_calls(past, customer)
    await past.roll_up()
    calls = (await past.ask("/queries/history", customer))["data"]
    assert in_all(await past.ask("/activity", customer)) == {
        "requests": len(calls), "input_tokens": sum(c["input_count"] for c in calls),
        "output_tokens": sum(c["output_count"] for c in calls), "cost_usd": sum(c["price_in_usd"] for c in calls),
    }  # fmt: skip


async def test_partitions_are_made_ahead_and_calls_find_them(past: Past) -> None:
    await make_partitions(past.rig.house.db)
    assert await make_partitions(past.rig.house.db) == 0
    names = {
        name
        for (name,) in past.rig.sql(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'usage'::regclass"
        )
    }
    month = TODAY().replace(day=1)
    for _ in range(4):
        assert f"usage_{month:%Y_%m}" in names
        month = (month + timedelta(days=31)).replace(day=1)
    customer = await past.rig.customer("10")
    await past.charge(customer, "0.01")
    assert past.rig.sql("SELECT tableoid::regclass::text FROM usage") == [(f"usage_{TODAY():%Y_%m}",)]


async def test_numbers_beyond_any_sum_do_not_stop_the_rollup(past: Past) -> None:
    customer = await past.rig.customer("10")
    await past.charge(customer, "0.01", usage={"input_tokens": 10**12})
    past.rig.sql("UPDATE usage SET units = jsonb_build_object('input_tokens', 9223372036854775807)")
    await past.charge(customer, "0.01", usage={"input_tokens": 10**12})
    await past.back(1)
    await past.roll_up()
    [line] = (await past.ask("/activity", customer))["data"]
    assert (line["input_tokens"], line["requests"]) == (2**63 - 1, 2)
