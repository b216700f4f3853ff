"""Whoever writes to the database as its owner, without the pepper, is found: every seal is looked at, and the first lie named."""

import asyncio
import contextlib
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from app.activity.archive import drop, export
from app.activity.rollup import roll_up
from app.admin.acts import write_act
from app.admin.tokens import create_token
from app.audit import AS_SEALED, Finding, Report, Secrets, audit, sealing
from app.audit.chain import CALL_DIGEST, ENTRY_DIGEST, KINDS, NO_CALL
from app.audit.sealing import Notary, head_of, seal
from app.audit.unbroken import look
from app.kernel.db import Database, row, rows
from app.kernel.errors import InvalidField
from app.kernel.lease import leads
from app.kernel.pace import Pace
from app.kernel.security import Admin, Kind, new_credit_id
from app.keys.issue import change
from app.keys.proof import MOVING, PROVEN
from app.keys.tables import ApiKey
from app.keys.verify import KeyOwner
from app.metering.holds import Ask, Work
from app.pricing import rules
from app.pricing.rows import Dimension
from app.pricing.starter import ensure_starter
from app.wiring import House
from tests.databases import kept
from tests.past import move_back_and_sort
from tests.seals_of_before import sealing_as_before
from tests.test_audit import SWAP, USD, Books, Lie, Owner, books, gift, planted, revoked

__all__ = ["books"]  # a fixture


@pytest.fixture
async def sealed(books: Books, request: pytest.FixtureRequest) -> Books:
    """Books with a bit of everything, prices, rules, tokens and acts too, sealed once; with the parameter `before`, as before."""
    house = books.house
    await ensure_starter(house.db)
    await house.db.transaction(lambda session: decided(session, house, books.account))
    for kind in ("service", "admin"):
        await create_token(house.db, house.settings.pepper, kind, "somebody")
    with sealing_as_before() if getattr(request, "param", "") == "before" else contextlib.nullcontext():
        assert await seal(house.db, house.settings.pepper) > 0
    return books


async def decided(session: AsyncSession, house: House, account_id: uuid.UUID) -> None:
    """Two floors, the second of which took the first one back, and rules."""
    for amount_nusd in (-5 * USD, 0):
        await write_act(
            session, house.settings.pepper, Admin(uuid.uuid4(), "ops"), "account.floor", str(account_id), "x", amount_nusd
        )  # fmt: skip
    await rules.set_override(session, "gpt-4o-mini", Dimension.INPUT, 7)
    await rules.set_markup(session, "default", multiplier_ppm=1_100_000)


async def looked(books: Books, noted_head: str | None = None) -> Report:
    return await audit(books.house.db, Secrets.of(books.house.settings), noted_head=noted_head)


async def sealed_again(books: Books, *, whole: bool = False) -> int:
    return await seal(books.house.db, books.house.settings.pepper, whole=whole)


# What is honest.


async def test_what_was_never_sealed_is_not_blamed(books: Books) -> None:
    report = await looked(books)
    assert (report.findings, report.seals) == ((), None)


async def test_sealed_books_are_clean_and_tell_how_far_the_seals_go(sealed: Books) -> None:
    report = await looked(sealed)
    assert report.findings == ()
    assert report.seals is not None
    assert (report.seals.unsealed, report.seals.unsealed_since) == (0, None)
    assert re.fullmatch(r"\d+:[0-9a-f]{32}", report.seals.head)


async def test_every_entry_key_credit_id_rule_token_and_act_has_its_seal(sealed: Books, owner_conn: Owner) -> None:
    [(entries,)] = owner_conn.execute("SELECT sum(count) FROM seal WHERE chain = 'entries'").fetchall()
    [(wanted,)] = owner_conn.execute("SELECT count(*) FROM entry").fetchall()
    assert entries == wanted
    for kind in KINDS:
        where = "WHERE kind = 'credit_id'" if kind.table == "credential" else ""
        [(count,)] = owner_conn.execute(f"SELECT count(*) FROM {kind.table} {where}".encode()).fetchall()
        [(seals,)] = owner_conn.execute(
            "SELECT count(DISTINCT (account_id, chain)) FROM seal WHERE starts_with(chain, %s)", [f"{kind.name}/"]
        ).fetchall()
        assert (kind.name, seals) == (kind.name, count)
        assert count > 0


async def test_an_account_of_more_entries_than_a_portion_is_sealed_whole(books: Books, owner_conn: Owner) -> None:
    """A chain that was cut goes on where it was, and no account behind it is left out."""
    for number in range(5):
        await a_call(books, f"of many {number}")
    assert await seal(books.house.db, books.house.settings.pepper, entries_at_once=2) > 0
    assert await sealed_again(books, whole=True) == 0
    assert owner_conn.execute("SELECT max(count) FROM seal WHERE chain = 'entries'").fetchall() == [(2,)]
    report = await looked(books)
    assert (report.findings, report.seals and report.seals.unsealed) == ((), 0)


async def test_who_seals_much_rests_after_each_portion_and_leads_on(
    books: Books, owner_conn: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        await a_call(books, f"of many {number}")
    house, rested = books.house, list[float]()

    async def rest(worked_seconds: float) -> None:
        rested.append(worked_seconds)

    assert await seal(house.db, house.settings.pepper, entries_at_once=2, rest=rest) > 0
    [(portions,)] = owner_conn.execute(
        "SELECT count(*) FROM seal_run WHERE id IN (SELECT run_id FROM seal WHERE chain = 'entries')"
    ).fetchall()
    assert 2 <= portions - 1 <= len(rested) <= portions
    assert min(rested) > 0

    async def rest_while_the_lease_ends(_: Pace, worked_seconds: float) -> None:
        rested.append(worked_seconds)
        owner_conn.execute("UPDATE job_lease SET claimed_until = now() + interval '1 second' WHERE name = 'seals'")

    for number in range(5):
        await a_call(books, f"of many more {number}")
    rested.clear()
    monkeypatch.setattr(sealing, "seal", partial(seal, entries_at_once=2))
    monkeypatch.setattr(Pace, "rest", rest_while_the_lease_ends)
    await Notary(house.db, house.settings.pepper).seal()
    assert len(rested) >= 2
    led_on = owner_conn.execute(
        "SELECT claimed_until > now() + interval '1 minute' FROM job_lease WHERE name = 'seals'"
    )
    assert led_on.fetchall() == [(True,)]
    assert await sealed_again(books, whole=True) == 0


async def test_seals_of_before_and_of_now_are_one_chain_whoever_makes_the_next(books: Books, owner_conn: Owner) -> None:
    """As while one process after another is renewed; either may lead."""
    for turn, as_before in enumerate((True, False, True, True, False, False)):
        for number in range(2):
            await a_call(books, f"{turn}/{number}")
        with sealing_as_before() if as_before else contextlib.nullcontext():
            assert await seal(books.house.db, books.house.settings.pepper, entries_at_once=3) > 0
    forms = owner_conn.execute(
        "SELECT form, count(*) > 0 FROM seal WHERE chain = 'entries' GROUP BY 1 ORDER BY 1"
    ).fetchall()
    assert forms == [(1, True), (2, True)]
    assert await sealed_again(books, whole=True) == 0
    report = await looked(books)
    assert (report.findings, report.seals and report.seals.unsealed) == ((), 0)


async def test_seals_are_the_same_whatever_encoding_a_shell_asks_for(
    books: Books, clean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Ask("of a model in another script", 700, "модель", None)
    await books.house.meter.charge("proxy", KeyOwner(books.account, books.key), ask, Work(700))
    await sealed_again(books)
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    elsewhere = Database(clean, pool_size=1)
    report = await audit(elsewhere, Secrets.of(books.house.settings))
    await elsewhere.close()
    assert (report.findings, report.seals and report.seals.unsealed) == ((), 0)


async def test_nothing_is_sealed_behind_a_gap_and_the_audit_names_it(books: Books, owner_conn: Owner) -> None:
    await sealed_again(books)
    for number in range(4):
        await a_call(books, f"with a gap {number}")
    last = named(books, owner_conn)["last"]
    owner_conn.execute("DELETE FROM entry WHERE account_id = %s AND id = %s", [books.account, last - 1])
    assert await sealed_again(books) == 1
    [(until,)] = owner_conn.execute(
        "SELECT max(number + count - 1) FROM seal WHERE chain = 'entries' AND account_id = %s", [books.account]
    ).fetchall()
    assert until == last - 2
    assert "entry_ids_have_no_gap" in {each.check for each in (await looked(books)).findings}


async def test_what_is_new_waits_for_its_seal_and_gets_it(sealed: Books) -> None:
    await a_call(sealed, "new")
    before = await looked(sealed)
    assert (before.findings, before.seals and before.seals.unsealed) == ((), 1)
    assert before.seals is not None
    assert before.seals.unsealed_since is not None
    assert await sealed_again(sealed) == 1
    after = await looked(sealed, before.seals.head)
    assert (after.findings, after.seals and after.seals.unsealed) == ((), 0)


async def a_call(books: Books, name: str) -> None:
    await books.house.meter.charge("proxy", KeyOwner(books.account, books.key), Ask(name, 700, "m", None), Work(700))


async def test_what_a_verb_changes_is_sealed_anew(sealed: Books) -> None:
    """A key's limit, once and back again; a key revoked; a rule that ends."""
    house, owner = sealed.house, KeyOwner(sealed.account, sealed.key)
    for limit_nusd in (5 * USD, None):
        await house.db.transaction(
            lambda session, to=limit_nusd: change(  # type: ignore[misc]
                session, house.keyring, owner.account_id, owner.key_id, {"limit_nusd": to}
            )
        )
        assert (await looked(sealed)).findings == ()
        assert await sealed_again(sealed) == 1
    [override] = await house.db.transaction(lambda session: rules.standing(session, "price_override"))
    await house.db.transaction(lambda session: rules.end(session, "price_override", override["id"]))
    assert (await looked(sealed)).findings == ()
    assert await sealed_again(sealed) == 1
    await revoked(house, owner)
    assert await sealed_again(sealed) == 1
    assert await sealed_again(sealed, whole=True) == 0
    assert (await looked(sealed)).findings == ()


async def test_calls_of_a_dropped_month_stay_sealed_as_archived(
    books: Books, owner_conn: Owner, clean: str, tmp_path: Path
) -> None:
    now, house = datetime.now(UTC), books.house
    month = (now - timedelta(days=102)).date().replace(day=1)
    await move_back_and_sort(house.db, owner_conn, 102)
    await sealed_again(books)
    await roll_up(house.db)
    owner = Database(clean, pool_size=1, role=None)
    await owner.open()
    await export(owner, month, tmp_path / "calls.csv.gz", now)
    await drop(owner, month, now, force=True)
    await owner.close()
    assert owner_conn.execute("SELECT count(*) FROM usage").fetchone() == (0,)
    assert (await looked(books)).findings == ()
    await sealed_again(books, whole=True)
    assert (await looked(books)).findings == ()


async def test_sealing_goes_on_where_a_process_died_and_two_at_once_seal_nothing_twice(books: Books) -> None:
    house = books.house
    done = await asyncio.gather(*(sealed_again(books) for _ in range(4)), return_exceptions=True)
    assert all(isinstance(each, int | IntegrityError) for each in done), done
    await sealed_again(books)
    assert (await looked(books)).findings == ()
    assert await sealed_again(books, whole=True) == 0
    assert await house.db.transaction(head_of) is not None


async def test_one_process_leads_until_its_lease_is_over(house: House, owner_conn: Owner) -> None:
    one, other = uuid.uuid4(), uuid.uuid4()
    assert await leads(house.db, "job", 60, one)
    assert not await leads(house.db, "job", 60, other)
    assert await leads(house.db, "job", 60, one)
    assert await leads(house.db, "another", 60, other)
    owner_conn.execute("UPDATE job_lease SET claimed_until = now() - interval '1 second'")
    assert await leads(house.db, "job", 60, other)
    assert not await leads(house.db, "job", 60, one)


async def test_sealing_waits_for_nobody_and_keeps_nobody_waiting(books: Books, owner_conn: Owner, clean: str) -> None:
    """While every account is locked, as by calls under way."""
    with psycopg.connect(clean) as other:
        other.execute("SELECT 1 FROM account FOR UPDATE")
        other.execute("LOCK TABLE entry IN ROW EXCLUSIVE MODE")
        assert await sealed_again(books) > 0
        other.rollback()
    assert (await looked(books)).findings == ()


# What is forged, by somebody who owns the database and has not the pepper.


@dataclass(frozen=True, slots=True)
class Forgery:
    """`subject` is a part of what the audit names; `seen` says that the database alone gives it away, too."""

    label: str
    check: str
    sql: str
    subject: str = ""
    seen: bool = False
    is_of_the_issue: bool = False


_LAST = """
    CREATE TEMP TABLE last AS
    SELECT e.account_id, e.id AS number, e.amount_nusd, u.id, u.key_id, u.hold_id, u.window_start
    FROM account a JOIN entry e ON e.account_id = a.id AND e.id = a.entry_count
    JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id WHERE a.id = {account};
    UPDATE api_key k SET lifetime_nusd = lifetime_nusd + amount_nusd,
           window_usage_nusd = window_usage_nusd + CASE WHEN k.window_start = l.window_start THEN amount_nusd ELSE 0 END
    FROM last l WHERE k.account_id = l.account_id AND k.id = l.key_id;
    UPDATE account a SET posted_nusd = posted_nusd - amount_nusd FROM last l WHERE a.id = l.account_id;"""
_LAST_DELETED = f"""{_LAST}
    UPDATE account SET entry_count = entry_count - 1 WHERE id = {{account}};
    DELETE FROM usage u USING last l WHERE u.id = l.id;
    DELETE FROM hold h USING last l WHERE h.account_id = l.account_id AND h.id = l.hold_id;
    DELETE FROM entry e USING last l WHERE e.account_id = l.account_id AND e.id = l.number;"""
_LAST_FREE = f"""{_LAST}
    UPDATE usage u SET cost_nusd = 0, balance_after_nusd = balance_after_nusd - amount_nusd FROM last l WHERE u.id = l.id;
    UPDATE entry e SET amount_nusd = 0, balance_after_nusd = balance_after_nusd - e.amount_nusd
    FROM last l WHERE e.account_id = l.account_id AND e.id = l.number; DROP TABLE last;"""
_LAST_SEAL = "SELECT max(number) FROM seal WHERE account_id = {account} AND chain = 'entries'"
_OF_ACCOUNT = (
    "entry",
    "usage",
    "hold",
    "api_key",
    "credential",
    "payment",
    "topup_address",
    "topup_invoice",
    "topup",
    "seal",
)
_WHOLE_ACCOUNT = "; ".join(
    (
        *(f"DELETE FROM {table} WHERE account_id = {{account}}" for table in _OF_ACCOUNT),
        "DELETE FROM account WHERE id = {account}",
    )
)
FORGERIES = (
    # (a) to (h) of the issue, each with its brothers
    Forgery("an adjustment that fits", "adjustment_has_its_reason", gift("adjustment", "forged", "adjustment", 5 * USD), "{account}", seen=True, is_of_the_issue=True),
    Forgery(
        "an adjustment that fits, with an act", "act_is_an_operator_s",
        "INSERT INTO admin_log (id, admin, act, subject, amount_nusd, proof) SELECT '11111111-1111-4111-8111-111111111111', 'ops', 'account.adjust', {account}, 5, proof FROM admin_log LIMIT 1; "
        + gift("adjustment", "act/11111111-1111-4111-8111-111111111111", "adjustment", 5), is_of_the_issue=True),
    Forgery("the last charge deleted with its money", "entries_are_as_sealed", _LAST_DELETED + "DROP TABLE last", "{account}/{last}", is_of_the_issue=True),
    Forgery(
        "the last charge deleted with its money and its seal", "runs_form_a_chain",
        f"{_LAST_DELETED} DROP TABLE last; DELETE FROM seal WHERE account_id = {{account}} AND chain = 'entries' AND number = ({_LAST_SEAL})", "run ", is_of_the_issue=True),
    Forgery("a call and its entry rewritten together", "entries_are_as_sealed", _LAST_FREE, "{account}/{last}", is_of_the_issue=True),
    Forgery("what a call used rewritten", "entries_are_as_sealed", "UPDATE usage SET units = '{{\"images\": 9}}', model = 'other' WHERE hold_id = {settled}", "{account}/"),
    Forgery("the price version of a call rewritten", "entries_are_as_sealed", "UPDATE usage SET price_version = 77 WHERE hold_id = {settled}", "{account}/"),
    Forgery("an entry backdated with its call", "entries_are_as_sealed", "UPDATE usage SET created_at = created_at - interval '1 minute' WHERE hold_id = {settled}; UPDATE entry SET created_at = created_at - interval '1 minute' WHERE account_id = {account} AND reference = {settled}::text", "{account}/"),
    Forgery("a floor lowered", "floor_has_its_act", "UPDATE account SET floor_nusd = -100000000000 WHERE id = {account}", "{account}", seen=True, is_of_the_issue=True),
    Forgery(
        "a floor lowered, with an act", "act_is_an_operator_s",
        "INSERT INTO admin_log (id, admin, act, subject, reason, amount_nusd, proof) SELECT gen_random_uuid(), admin, act, subject, reason, -100000000000, proof FROM admin_log WHERE act = 'account.floor' LIMIT 1; UPDATE account SET floor_nusd = -100000000000 WHERE id = {account}", is_of_the_issue=True),
    Forgery("a floor of yesterday, and the act that took it back gone", "settings_are_as_sealed", "DELETE FROM admin_log WHERE act = 'account.floor' AND amount_nusd = 0; UPDATE account SET floor_nusd = -5000000000 WHERE id = {account}", "admin_log "),
    Forgery("two credit ids swapped", "credential_is_bound", SWAP.format(kind="credit_id"), is_of_the_issue=True),
    Forgery("two keys' secrets swapped", "credential_is_bound", SWAP.format(kind="api_key")),
    Forgery("a sealed secret moved", "kept_key_opens", "UPDATE api_key SET sealed_secret = (SELECT sealed_secret FROM api_key WHERE id = {key}) WHERE account_id = {other}", is_of_the_issue=True),
    Forgery("an active price edited", "prices_are_as_sealed", "UPDATE price SET price_pusd = 1 WHERE model = 'gpt-4o-mini' AND dimension = 'output'", "price/1/gpt-4o-mini/", is_of_the_issue=True),
    Forgery("an active price for more units", "prices_are_as_sealed", "UPDATE price SET per_units = 1000000 WHERE model = 'gpt-4o-mini' AND dimension = 'output'", "price/1/gpt-4o-mini/"),
    Forgery("an active price deleted", "prices_are_as_sealed", "DELETE FROM price WHERE model = 'gpt-4o-mini' AND dimension = 'output'", "price/1/"),
    Forgery("the last line of a version deleted", "prices_are_as_sealed", "DELETE FROM priced_model WHERE ctid = (SELECT ctid FROM priced_model ORDER BY model COLLATE \"C\" DESC, provider COLLATE \"C\" DESC LIMIT 1)", "prices/1"),
    Forgery("a price slipped into an active version", "prices_are_as_sealed", "INSERT INTO price SELECT version_id, 'aaa', provider, dimension, tier_min, attributes, 1, 1, effective_from FROM price LIMIT 1", "price/1/aaa/"),
    Forgery("what a model's calls leave out made cheap", "prices_are_as_sealed", "UPDATE priced_model SET default_attributes = 'x=y' WHERE model = 'gpt-4o-mini'", "model/1/gpt-4o-mini"),
    Forgery("a whole version of prices gone", "prices_are_as_sealed", "DELETE FROM price; DELETE FROM priced_model; DELETE FROM price_version", "prices/1"),
    Forgery("an override made cheap", "settings_are_as_sealed", "UPDATE price_override SET price_pusd = 0", "price_override "),
    Forgery("an override removed", "settings_are_as_sealed", "DELETE FROM price_override", "price_override "),
    Forgery("a markup taken off", "settings_are_as_sealed", "UPDATE markup SET multiplier_ppm = 0", "markup "),
    Forgery("a fee lowered", "settings_are_as_sealed", "UPDATE fee SET price_nusd = 1", "fee "),
    Forgery("a token's hash replaced", "settings_are_as_sealed", "UPDATE admin_token SET secret_hash = 'mine'", "admin_token "),
    Forgery("an operator's token for ever", "settings_are_as_sealed", "UPDATE admin_token SET expires_at = now() + interval '9 years'", "admin_token "),
    Forgery("a token's scopes widened", "settings_are_as_sealed", "UPDATE admin_token SET scopes = ARRAY['money']", "admin_token "),
    Forgery("a proxy's holds released when they expire", "settings_are_as_sealed", "UPDATE service_token SET on_expiry = 'release'", "service_token "),
    Forgery("a key's limit raised", "settings_are_as_sealed", "UPDATE api_key SET limit_nusd = 900000000000 WHERE account_id = {account} AND name = 'moved'", "api_key {account}/"),
    Forgery("a key's limit raised as by its owner", "settings_are_as_sealed", "UPDATE api_key SET limit_nusd = 900000000000, revision = revision + 1, updated_at = now() WHERE account_id = {account} AND name = 'moved'", "api_key {account}/", is_of_the_issue=True),
    Forgery("a key that was revoked, back", "settings_are_as_sealed", "UPDATE api_key SET deleted_at = NULL WHERE account_id = {account} AND name = 'revoked'", "api_key {account}/"),
    Forgery("a key widened", "settings_are_as_sealed", "UPDATE api_key SET scopes = NULL, allowed_models = NULL, expire_at = NULL, proof = NULL WHERE id = {key}", "api_key {account}/{key}"),
    Forgery("the first seal removed", "entries_are_as_sealed", "DELETE FROM seal WHERE account_id = {account} AND chain = 'entries' AND number = 1", "{account}/1", is_of_the_issue=True),
    Forgery("the last seal removed", "runs_form_a_chain", f"DELETE FROM seal WHERE account_id = {{account}} AND chain = 'entries' AND number = ({_LAST_SEAL})", "run "),
    Forgery("a key's seal removed", "runs_form_a_chain", "DELETE FROM seal WHERE chain = 'key/' || {key}", "run "),
    Forgery("a price version's seal removed", "runs_form_a_chain", "DELETE FROM seal WHERE chain = 'prices/1'", "run "),
    Forgery("a seal of another account", "entries_are_as_sealed", "UPDATE seal s SET links = o.links, kept = o.kept, count = o.count FROM seal o WHERE s.account_id = {account} AND o.account_id = {other} AND s.chain = 'entries' AND o.chain = 'entries' AND s.number = 1 AND o.number = 1", "{account}/1", is_of_the_issue=True),
    Forgery("an entry changed, and its digest in its seal too", "entries_are_as_sealed", f"UPDATE entry SET contra = 'x' WHERE account_id = {{account}} AND id = 2; UPDATE seal s SET links = overlay(links PLACING (SELECT {ENTRY_DIGEST} FROM entry e WHERE e.account_id = s.account_id AND e.id = 2) FROM 17 FOR 16) WHERE account_id = {{account}} AND chain = 'entries' AND number = 1", "{account}/"),
    Forgery("a call changed, and its digest in its seal too", "entries_are_as_sealed", f"UPDATE usage SET model = 'x' WHERE account_id = {{account}}; UPDATE seal s SET kept = (SELECT string_agg(CASE WHEN u.id IS NULL THEN '\\x{NO_CALL.hex()}'::bytea ELSE {CALL_DIGEST} END, ''::bytea ORDER BY e.id) FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id WHERE e.account_id = s.account_id AND e.id BETWEEN s.number AND s.number + s.count - 1) WHERE account_id = {{account}} AND chain = 'entries'", "{account}/"),
    Forgery("a seal said to be of the other form", "entries_are_as_sealed", "UPDATE seal SET form = 3 - form WHERE account_id = {account} AND chain = 'entries'", "{account}/"),
    Forgery("a seal shortened", "runs_form_a_chain", "UPDATE seal SET count = count - 1, links = substr(links, 1, length(links) - 16), kept = substr(kept, 1, length(kept) - 16) WHERE account_id = {account} AND chain = 'entries' AND number = 1", "run "),
    Forgery("an account made away with, its chain too", "runs_form_a_chain", _WHOLE_ACCOUNT, "run ", is_of_the_issue=True),
    Forgery("a run removed", "runs_form_a_chain", "DELETE FROM seal_run WHERE id = 1", "run 1"),
    Forgery("a run's promise put off", "runs_form_a_chain", "UPDATE seal_run SET until = until - interval '1 day' WHERE id = (SELECT max(id) FROM seal_run)", "run "),
    Forgery("all runs removed, their seals left", "runs_form_a_chain", "DELETE FROM seal_run", "run"),
)  # fmt: skip


@pytest.mark.parametrize("sealed", ["now", "before"], indirect=True)
async def test_each_forgery_without_the_pepper_is_found_and_the_first_row_named(
    sealed: Books, owner_conn: Owner, clean: str
) -> None:
    """Each in a transaction of its own that is rolled back, as nothing else is looked at than rows and seals."""
    await a_call(sealed, "last of all")
    await sealed_again(sealed)
    names = named(sealed, owner_conn)
    owner, secrets = Database(clean, pool_size=1, role=None), Secrets.of(sealed.house.settings)
    missed = []

    class Undone(Exception):
        """What was planted is taken back."""

    async def plant_and_look(session: AsyncSession, forgery: Forgery) -> None:
        await row(session, "SET LOCAL session_replication_role = replica")
        for statement in sealed.fill(forgery.sql).split(";"):
            await (await session.connection()).exec_driver_sql(statement)
        found, _ = await look(session, secrets.pepper)
        subject = forgery.subject.format(**names)
        if not [each for each in found if each.check == forgery.check and subject in each.subject]:
            missed.append((forgery.label, found))
        raise Undone

    for forgery in FORGERIES:
        if forgery.check in AS_SEALED:
            with pytest.raises(Undone):
                await owner.transaction(lambda session, one=forgery: plant_and_look(session, one))  # type: ignore[misc]
    await owner.close()
    assert missed == []
    assert (await looked(sealed)).findings == ()


def named(books: Books, conn: Owner) -> dict[str, Any]:
    [(last,)] = conn.execute("SELECT entry_count FROM account WHERE id = %s", [books.account]).fetchall()
    return {"account": books.account, "key": books.key, "last": last}


async def test_a_forgery_is_found_by_the_audit_and_no_later_seal_makes_it_true(
    sealed: Books, owner_conn: Owner
) -> None:
    await a_call(sealed, "last of all")
    await sealed_again(sealed)
    names, put_back = named(sealed, owner_conn), kept(owner_conn)
    for forgery in FORGERIES:
        if forgery.is_of_the_issue:
            with planted(owner_conn, Lie(forgery.label, forgery.check, forgery.sql), sealed):
                alone = await audit(sealed.house.db)
                report = await looked(sealed)
                await sealed_again(sealed, whole=True)
                later = await looked(sealed)
                put_back()
            assert forgery.seen == bool(alone.findings), (forgery.label, alone.findings)
            for told in (report, later):
                found = [each for each in told.findings if each.check == forgery.check]
                assert any(forgery.subject.format(**names) in each.subject for each in found), (forgery.label, told)
    assert (await looked(sealed)).findings == ()


async def test_books_put_back_to_an_earlier_state_are_found_by_the_head_that_was_noted(
    sealed: Books, owner_conn: Owner
) -> None:
    """Rows, seals and runs of the last minutes gone without a trace: the database alone cannot tell."""
    await a_call(sealed, "last of all")
    notary = Notary(sealed.house.db, sealed.house.settings.pepper)
    assert await notary.seal() == 1
    report = await looked(sealed)
    assert report.seals is not None
    [(run_id,)] = owner_conn.execute("SELECT max(run_id) FROM seal").fetchall()
    back = f"{_LAST_DELETED} DROP TABLE last; DELETE FROM seal WHERE run_id >= {run_id}; DELETE FROM seal_run WHERE id >= {run_id}"
    with planted(owner_conn, Lie("back", "", back), sealed):
        assert (await looked(sealed)).findings == ()
        told = await looked(sealed, report.seals.head)
        assert [each.check for each in told.findings] == ["noted_head_still_stands"]
        await a_call(sealed, "another last")
        await sealed_again(sealed)
        told = await looked(sealed, report.seals.head)
        assert [each.recorded for each in told.findings] == ["another run of this number"]
        owner_conn.execute("TRUNCATE seal, seal_run")
        told = await looked(sealed, report.seals.head)
        assert [each.recorded for each in told.findings] == ["nothing is sealed"]
    with pytest.raises(InvalidField, match="no head"):
        await looked(sealed, "yesterday")


async def test_a_replayed_state_of_a_key_is_found(sealed: Books, owner_conn: Owner) -> None:
    """What its owner once set, proven then, and has changed since."""
    house, owner = sealed.house, KeyOwner(sealed.account, sealed.key)
    owner_conn.execute("CREATE TEMP TABLE once AS SELECT * FROM api_key WHERE id = %s", [owner.key_id])
    await house.db.transaction(
        lambda session: change(session, house.keyring, owner.account_id, owner.key_id, {"limit_nusd": 1})
    )
    await sealed_again(sealed)
    owner_conn.execute(
        "UPDATE api_key k SET limit_nusd = o.limit_nusd, revision = o.revision, proof = o.proof FROM once o WHERE k.id = o.id"
    )
    await sealed_again(sealed, whole=True)
    [finding] = (await looked(sealed)).findings
    assert (finding.check, finding.subject) == ("settings_are_as_sealed", f"api_key {owner.account_id}/{owner.key_id}")


async def test_a_credit_id_that_was_replaced_does_not_come_back(sealed: Books, owner_conn: Owner) -> None:
    house, account_id = sealed.house, sealed.account
    of_it = "FROM credential WHERE kind = 'credit_id' AND account_id = %s"
    owner_conn.execute(f"CREATE TEMP TABLE once AS SELECT * {of_it}".encode(), [account_id])
    owner_conn.execute(f"DELETE {of_it}".encode(), [account_id])
    await house.db.transaction(
        lambda session: house.keyring.register(session, new_credit_id(), Kind.CREDIT_ID, account_id, None)
    )
    assert (await looked(sealed)).findings == ()
    assert await sealed_again(sealed) == 1
    assert (await looked(sealed)).findings == ()
    owner_conn.execute(f"DELETE {of_it}".encode(), [account_id])
    owner_conn.execute("INSERT INTO credential SELECT * FROM once")
    await sealed_again(sealed, whole=True)
    assert [each.check for each in (await looked(sealed)).findings] == ["settings_are_as_sealed"]


async def test_an_end_comes_once_and_is_not_taken_back(sealed: Books, owner_conn: Owner) -> None:
    """A rule that ended and a token that was revoked do not come back."""
    owner_conn.execute(
        "UPDATE price_override SET effective_to = effective_from; UPDATE admin_token SET revoked_at = now()"
    )
    assert await sealed_again(sealed, whole=True) == 2
    owner_conn.execute("UPDATE price_override SET effective_to = NULL; UPDATE admin_token SET revoked_at = NULL")
    assert {each.subject.split()[0] for each in settings_found(await looked(sealed))} == {
        "price_override",
        "admin_token",
    }


def settings_found(report: Report) -> list[Finding]:
    return [each for each in report.findings if each.check == "settings_are_as_sealed"]


async def test_what_is_older_than_the_promise_and_has_no_seal_is_a_finding(sealed: Books, owner_conn: Owner) -> None:
    """Also what was slipped in as of long ago; what is younger waits. Whatever it is."""
    with planted(owner_conn, Lie("old", "", gift("adjustment", "forged", "adjustment", 5)), sealed):
        owner_conn.execute(
            "UPDATE entry SET created_at = created_at - interval '1 day' WHERE reference = 'forged';"
            " INSERT INTO fee (id, feature, price_nusd, created_at) VALUES (gen_random_uuid(), 'x', 1, now() - interval '1 day');"
            " INSERT INTO price_version (id, source, source_hash, created_at) VALUES (9, 'x', 'x', now() - interval '1 day')"
        )
        await sealed_again(sealed)  # looks at what is new alone
        found = [each.subject for each in (await looked(sealed)).findings if each.check == "nothing_old_is_unsealed"]
    assert [each.split("/")[0].split()[0] for each in sorted(found)] == sorted([str(sealed.account), "fee"])


async def test_every_kind_of_check_over_seals_has_a_forgery_that_it_finds() -> None:
    assert {forgery.check for forgery in FORGERIES} & set(AS_SEALED) == set(AS_SEALED) - {
        "noted_head_still_stands", "nothing_old_is_unsealed"
    }  # fmt: skip


# What must be decided when a column is added.


def test_every_column_of_a_key_is_proven_or_moves() -> None:
    assert sorted((*PROVEN, *MOVING)) == sorted(column.name for column in ApiKey.__table__.columns)  # type: ignore[attr-defined]


@pytest.mark.parametrize("table", ["admin_token", "fee", "markup", "price_override", "service_token"])
def test_every_column_of_a_rule_or_token_is_sealed(table: str) -> None:
    [kind] = [kind for kind in KINDS if kind.table == table]
    columns = SQLModel.metadata.tables[table].columns
    assert [column.name for column in columns if f"x.{column.name}" not in kind.sql] == []


async def test_sealed_rows_can_only_be_added_by_the_service(house: House) -> None:
    for statement in (
        "UPDATE seal SET count = 1", "DELETE FROM seal", "UPDATE seal_run SET seals = 1", "DELETE FROM seal_run",
        "TRUNCATE seal",
    ):  # fmt: skip
        with pytest.raises(Exception, match="permission denied"):
            await house.db.transaction(lambda session, one=statement: rows(session, one))  # type: ignore[misc]
