"""The audit that never ends: it is quiet over honest books, and what nothing explains shows in its figures within a turn."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.audit import CHECKS
from app.audit.continuous import SLICED, Figures, _windows, figures, look_at_new, look_on, only_of, walk
from app.audit.schema import SCHEMA
from app.metering.holds import Ask, Work
from app.wiring import House
from tests.databases import kept
from tests.rig import Rig
from tests.test_audit import LIES, USD, Books, Lie, Owner, books, gift, opened, owner_of, paid, planted

__all__ = ["books"]  # a fixture


async def told(house: House) -> Figures | None:
    return await house.db.transaction(figures)


async def a_round(house: House, accounts_at_once: int = 1) -> None:
    while await walk(house.db, accounts_at_once):
        """The next slice."""


async def test_nothing_is_told_before_anything_was_looked_at(house: House) -> None:
    assert await told(house) is None


async def test_honest_books_are_explained_whole_also_account_by_account(books: Books) -> None:
    for accounts_at_once in (1, 500):
        await a_round(books.house, accounts_at_once)
        assert await told(books.house) == Figures(1.0, 0.0, 0)


async def test_a_turn_looks_at_a_slice_until_the_round_is_over_and_then_at_nothing_for_a_while(
    house: House, owner_conn: Owner
) -> None:
    def rounds() -> Any:
        return owner_conn.execute("SELECT rounds, looked_at FROM audit_walk WHERE name = 'walk'").fetchall()

    accounts = [await opened(house) for _ in range(3)]
    await paid(house, accounts[0].account_id, uuid.uuid4(), "btc", "USD", 10 * USD)
    assert await look_on(house.db) == 3
    assert rounds()[0][0] == 0
    assert await look_on(house.db) == 0  # behind the last account is what is nobody's
    [(one, _)] = over = rounds()
    owner = await owner_of(house, accounts[0])
    await house.meter.charge("proxy", owner, Ask("new", 700, None, None), Work(700))
    assert await look_on(house.db) == 0
    assert (one, over) == (1, rounds())
    assert await look_at_new(house.db) == 0
    assert await told(house) == Figures(1.0, 0.0, 0)


@pytest.mark.parametrize("seconds", [0, 0.5, 14, 99, 86_400 * 30])
def test_windows_leave_nothing_out_however_long_ago_it_was_looked(seconds: float) -> None:
    now = datetime.now(UTC)
    windows = list(_windows(now - timedelta(seconds=seconds), now))
    assert windows[0][0] == now - timedelta(seconds=seconds)
    assert [until for _, until in windows[:-1]] == [since for since, _ in windows[1:]]
    assert windows[-1][0] <= now < windows[-1][1]
    assert len(windows) <= 51


UNEXPLAINED = (
    Lie("an adjustment for no reason", "", gift("adjustment", "forged", "adjustment", 5 * USD)),
    Lie("a usage of no call", "", gift("usage", str(uuid.uuid4()), "revenue:usage", -5)),
    Lie("a top-up that is not", "", gift("topup", f"{uuid.uuid4()}/0", "btcpay:btc", 5)),
    Lie("a bonus of no top-up", "", gift("bonus", f"{uuid.uuid4()}/0", "bonus:lightning", 5)),
    Lie("a refund of no call", "", gift("refund", str(uuid.uuid4()), "revenue:usage", 5)),
    Lie("a refund by a word", "", gift("refund", "failed video", "revenue:usage", 5)),
    Lie("a review that never was", "", gift("adjustment", f"review/{uuid.uuid4()}/1", "adjustment", 5)),
)


async def test_an_entry_that_nothing_explains_shows_as_soon_as_it_is_new(books: Books, owner_conn: Owner) -> None:
    """Without a walk over all accounts; and it ages."""
    await a_round(books.house)
    await look_at_new(books.house.db)
    [(entries,)] = owner_conn.execute("SELECT count(*) FROM entry").fetchall()
    for count, lie in enumerate(UNEXPLAINED, 1):
        with planted(owner_conn, lie, books):
            assert await look_at_new(books.house.db) == 1, lie.label
        found = await told(books.house)
        assert found is not None
        assert found.explained_ratio == pytest.approx(1 - count / entries), lie.label
    owner_conn.execute("UPDATE audit_finding SET oldest_at = oldest_at - interval '1 hour'")
    aged = await told(books.house)
    assert aged is not None
    assert 3600 <= aged.oldest_unexplained_seconds < 7200


async def test_an_entry_that_was_committed_late_is_looked_at_too(books: Books, owner_conn: Owner) -> None:
    await a_round(books.house)
    assert await look_at_new(books.house.db) == 0
    with planted(owner_conn, UNEXPLAINED[0], books):
        owner_conn.execute("UPDATE entry SET created_at = now() - interval '1 minute' WHERE reference = 'forged'")
        assert await look_at_new(books.house.db) == 0  # it looks at what came since it looked last
        owner_conn.execute("UPDATE audit_walk SET seen_until = seen_until - interval '100 seconds' WHERE name = 'walk'")
        assert await look_at_new(books.house.db) == 1
    found = await told(books.house)
    assert found is not None
    assert found.explained_ratio < 1


async def test_what_was_unexplained_and_is_no_more_is_forgotten(books: Books, owner_conn: Owner) -> None:
    with planted(owner_conn, UNEXPLAINED[0], books):
        await a_round(books.house)
        found = await told(books.house)
        assert found is not None
        assert (found.explained_ratio < 1, found.differences > 0) == (True, True)
        owner_conn.execute(
            """UPDATE account a SET posted_nusd = posted_nusd - 5000000000, entry_count = entry_count - 1
               FROM entry e WHERE e.account_id = a.id AND e.reference = 'forged'; DELETE FROM entry WHERE reference = 'forged'"""
        )
    await a_round(books.house)
    assert await told(books.house) == Figures(1.0, 0.0, 0)


FOUND_IN_SLICES = {
    "a balance raised by a nano-dollar", "a call without its entry", "a key's window emptied", "a price line made cheaper",
    "a credit without its payments", "a thousand dollars lent by nobody", "a wallet asked to pay a thief",
}  # fmt: skip


async def test_a_slice_finds_what_the_whole_audit_finds(books: Books, owner_conn: Owner) -> None:
    put_back = kept(owner_conn)
    lies = [lie for lie in LIES if lie.label in FOUND_IN_SLICES]
    assert len(lies) == len(FOUND_IN_SLICES)
    for lie in lies:
        with planted(owner_conn, lie, books):
            await a_round(books.house)
            found = await told(books.house)
            put_back()
        assert found is not None
        assert found.differences > 0, lie.label
    await a_round(books.house)
    assert await told(books.house) == Figures(1.0, 0.0, 0)


def test_every_check_but_those_of_all_accounts_is_done_in_slices() -> None:
    assert {check.name for check in CHECKS} - {check.name for check in (*SLICED, *SCHEMA)} == {
        "days_of_dropped_months_stay",
        "put_away_entries_are_those_of_their_archive",
    }
    assert "entry AS" in only_of("SELECT 1 FROM entry e")
    assert only_of("SELECT 1 FROM webhook_delivery") == ""


async def test_metrics_tell_the_figures_of_whichever_process_found_them(rig: Rig) -> None:
    await rig.customer("10")
    await look_on(rig.house.db)
    text = (await rig.client.get("/metrics")).text
    found: dict[str, Any] = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("satmeter_"))
    assert float(found["satmeter_entries_explained_ratio"]) == 1
    assert float(found["satmeter_oldest_unexplained_seconds"]) == 0
    assert float(found["satmeter_continuous_audit_differences"]) == 0
