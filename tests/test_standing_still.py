"""After hours in which nothing ran, the auditor blames nobody for what a job is about to do; and blames a job that was there."""

import psycopg
import pytest

from app.audit import Report, Secrets, audit
from tests.past import move_back
from tests.rig import Customer, Rig

EXPIRER = "INSERT INTO figure (name, value, found_at) VALUES ('job/expire holds', 5000, now() - interval '{ago}') ON CONFLICT (name) DO UPDATE SET found_at = EXCLUDED.found_at"  # fmt: skip


async def a_hold_of_hours_ago(rig: Rig) -> Customer:
    """It began a day ago and ended a quarter of an hour later; so did everything else."""
    customer = await rig.customer("20")
    allowed = await rig.authorize(customer.api_key, "0.5")
    assert allowed["hold_id"], allowed
    with psycopg.connect(rig.database_url, autocommit=True) as conn:
        move_back(conn, 1)
    rig.sql(
        "UPDATE hold SET created_at = created_at - interval '24 hours', expires_at = expires_at - interval '24 hours'"
    )
    return customer


async def report_of(rig: Rig) -> Report:
    return await audit(rig.house.db, Secrets.of(rig.house.settings))


async def late(rig: Rig) -> set[str]:
    return {finding.check for finding in (await report_of(rig)).findings}


async def test_a_service_that_stood_still_with_its_database_is_not_blamed(rig: Rig) -> None:
    customer = await a_hold_of_hours_ago(rig)
    assert await late(rig) == set(), "nothing happened since, so nobody was there"
    rig.sql(EXPIRER.format(ago="24 hours"))
    await rig.authorize(customer.api_key, "0.5")
    assert await late(rig) == set(), "calls come again, and the expirer will in a moment"


@pytest.mark.parametrize("ago", ["0 seconds", "4 hours"])
async def test_an_expirer_that_passed_it_by_is_blamed(ago: str, rig: Rig) -> None:
    await a_hold_of_hours_ago(rig)
    rig.sql(EXPIRER.format(ago=ago))
    assert await late(rig) == {"no_hold_outlives_its_time"}
    rig.sql("UPDATE hold SET expires_at = now() + interval '1 hour'")


async def test_an_expirer_that_is_away_while_calls_come_is_blamed(rig: Rig) -> None:
    customer = await a_hold_of_hours_ago(rig)
    rig.sql(EXPIRER.format(ago="24 hours"))
    await rig.authorize(customer.api_key, "0.5")
    rig.sql("UPDATE hold SET created_at = created_at - interval '6 minutes' WHERE expires_at > now()")
    assert await late(rig) == {"no_hold_outlives_its_time"}
    rig.sql("UPDATE hold SET expires_at = now() + interval '1 hour'")


async def test_calls_without_any_job_are_told(rig: Rig) -> None:
    customer = await a_hold_of_hours_ago(rig)
    await rig.authorize(customer.api_key, "0.5")
    assert await late(rig) == {"no_hold_outlives_its_time"}
    rig.sql("UPDATE hold SET expires_at = now() + interval '1 hour'")


async def test_topups_and_webhooks_that_wait_for_their_jobs_are_not_blamed_either(rig: Rig) -> None:
    customer = await rig.customer()
    invoice_id = await rig.topup(customer, "20")
    rig.btcpay.pay(invoice_id)
    await rig.deliver(invoice_id)
    for statement in (
        "UPDATE topup SET next_check_at = now() - interval '30 hours', watch_until = now() + interval '1 day'",
        "UPDATE webhook_delivery SET received_at = now() - interval '29 hours'",
        "INSERT INTO figure (name, value, found_at) SELECT 'job/' || n, 1, now() - interval '29 hours' FROM unnest(ARRAY['check top-ups', 'look into webhooks']) n",
    ):
        rig.sql(statement)
    report = await report_of(rig)
    assert report.is_clean, report.findings
    rig.sql("UPDATE figure SET found_at = now()")
    report = await report_of(rig)
    assert {finding.check for finding in report.findings} == {"open_topup_is_watched", "webhooks_are_looked_into"}
    await rig.process()
    await rig.poll()
