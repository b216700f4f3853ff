"""The doctor finds every fault that is planted, in the database, at the backend, on the machine and in the traffic; and no other."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from app.admin.tokens import create_token
from app.client.spool import Owed, SpoolFile
from app.doctor import Line, examine, exit_code
from app.doctor.backends import hook_line, permissions_line, rate_line
from app.doctor.database import _is_elsewhere, clock_line, latency_line, standby_line
from app.doctor.lines import Level, duration
from app.doctor.machine import days_left, disk_line, sealing_line, token_line
from app.doctor.traffic import proxy_line
from app.kernel.security import new_secret
from app.kernel.settings import Settings
from app.main import create_app
from app.migrations import head
from app.sandbox.btcpay import LEAST_PERMISSIONS, MODIFY, SandboxConfig, create_sandbox
from app.serve import Connections, Limits, http_server
from app.topups.setup import Hook
from app.wiring import House, build
from tests import databases

FAULT, WARNING, OK = Level.FAULT, Level.WARNING, Level.OK


@dataclass
class Clinic:
    """Satmeter and the sandbox as they are served, and what a saboteur needs."""

    house: House
    url: str
    world: httpx.AsyncClient
    """The sandbox, as its driver and as the store's owner."""
    conn: psycopg.Connection[Any]

    async def plant(self, **setup: Any) -> None:
        """In the store's set-up."""
        answer = await self.world.post("/sandbox/setup", json=setup)
        assert answer.status_code == 200, answer.text

    async def hook(self, **changed: Any) -> None:
        """Change the store's webhook."""
        store = f"/api/v1/stores/{self.house.settings.btcpay_store_id}/webhooks"
        (hook,) = (await self.world.get(store)).json()
        events = {"everything": True, "specificEvents": []}
        body = {"url": hook["url"], "enabled": True, "automaticRedelivery": True, "authorizedEvents": events} | changed
        assert (await self.world.put(f"{store}/{hook['id']}", json=body)).status_code == 200

    async def is_delivered(self) -> None:
        """Until the webhook of an invoice was delivered, whatever came of it."""
        settings = self.house.settings
        store = f"/api/v1/stores/{settings.btcpay_store_id}"
        (hook,) = (await self.world.get(f"{store}/webhooks")).json()
        deliveries = f"{store}/webhooks/{hook['id']}/deliveries"
        before = len((await self.world.get(deliveries)).json())
        assert (await self.world.post(f"{store}/invoices", json={"amount": "5", "currency": "USD"})).status_code == 200
        deadline = time.monotonic() + 20
        while len((await self.world.get(deliveries)).json()) == before:
            assert time.monotonic() < deadline

    def sql(self, statement: str) -> None:
        self.conn.execute(statement.encode())

    async def says(self, **settings: Any) -> dict[str, Line]:
        """What the doctor says, with some settings changed; the lines that are not `ok` by what they are about."""
        if not settings:
            return _by_name(await examine(self.house, self.url))
        house = build(replace(self.house.settings, **settings), settings.get("database_url") or self.url)
        await house.db.open()
        try:
            return _by_name(await examine(house, settings.get("database_url") or self.url))
        finally:
            await house.close()


def _by_name(lines: tuple[Line, ...]) -> dict[str, Line]:
    """How near the database seems on a busy machine is nobody's fault here."""
    return {line.about: line for line in lines if line.level is not OK and line.about != "database.latency"}


@contextlib.asynccontextmanager
async def served(app: Any, listener: socket.socket) -> AsyncIterator[None]:
    connections = Connections(Limits())
    server = http_server(app, connections, lifespan="on", timeout_graceful_shutdown=20)
    async with connections.watched():
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield
        finally:
            server.leave_at_once()
            await serving


@pytest.fixture(scope="module")
async def clinic(
    database_url: str, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Clinic]:
    databases.empty(database_url)
    ours, theirs = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    port, sandbox_port = ours.getsockname()[1], theirs.getsockname()[1]
    settings = replace(
        settings, port=port, public_url=f"http://127.0.0.1:{port}", sandbox_port=sandbox_port, database_pool=2,
        data_dir=tmp_path_factory.mktemp("clinic"),
    )  # fmt: skip
    house, doctors = build(settings, database_url), build(settings, database_url)
    sandbox = create_sandbox(
        SandboxConfig(
            state_dir=settings.data_dir / "sandbox", public_url=settings.sandbox_url, store_id=settings.btcpay_store_id,
            api_key=settings.btcpay_api_key, webhook_url=f"{settings.public_url}/webhooks/btcpay",
            webhook_secret=settings.btcpay_webhook_secret, permissions=LEAST_PERMISSIONS, time_scale=0.001,
        )
    )  # fmt: skip
    headers = {"Authorization": f"token {settings.btcpay_api_key}"}
    await doctors.db.open()
    async with (
        served(sandbox, theirs), served(create_app(house), ours),
        httpx.AsyncClient(base_url=settings.sandbox_url, headers=headers, trust_env=False, timeout=20) as world,
    ):  # fmt: skip
        with psycopg.connect(database_url, autocommit=True) as conn:
            yield Clinic(doctors, database_url, world, conn)
    await doctors.close()


async def test_it_finds_nothing_where_nothing_is_wrong(clinic: Clinic) -> None:
    lines = await examine(clinic.house, clinic.url)
    assert _by_name(lines) == {}
    assert {"database", "database.role", "btcpay.permissions", "btcpay.webhook", "method.btc-lightning", "relays", "public_url", "disk", "jobs"} <= {line.about for line in lines}  # fmt: skip


# --- at the backend -----------------------------------------------------------------------------------

PERMISSIONS = list(LEAST_PERMISSIONS)


@pytest.mark.parametrize(
    ("planted", "about", "level", "words"),
    [
        ({"permissions": [*PERMISSIONS, MODIFY]}, "btcpay.permissions", FAULT, "canmodifyinvoices; its thief"),
        ({"permissions": ["unrestricted"]}, "btcpay.permissions", FAULT, "unrestricted"),
        ({"permissions": [p for p in PERMISSIONS if "viewstoresettings" not in p]}, "btcpay.permissions", FAULT, "lacks btcpay.store.canviewstoresettings"),
        ({"permissions": [p for p in PERMISSIONS if "createinvoice" not in p]}, "btcpay.permissions", FAULT, "lacks btcpay.store.cancreateinvoice"),
        ({"permissions": [*PERMISSIONS, "btcpay.store.canviewinvoices:another"]}, "btcpay.permissions", WARNING, "other stores"),
        ({"permissions": [*PERMISSIONS, "btcpay.user.canviewprofile"]}, "btcpay.permissions", WARNING, "canviewprofile"),
        ({"synchronized": False}, "btcpay.sync", FAULT, "not in step"),
        ({"disabled": ["LTC-CHAIN"]}, "method.ltc", FAULT, "not enabled in the store"),
        ({"offline": ["XMR-CHAIN"]}, "method.xmr", FAULT, "not available"),
        ({"offline": ["BTC-LN"]}, "method.btc-lightning", FAULT, "Full node not available"),
        ({"bolt11_minutes": 60}, "method.btc-lightning", WARNING, "minutes longer than BTCPay's"),
        ({"bolt11_minutes": 1}, "method.btc-lightning", WARNING, "but only for"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_the_store_is_found(
    clinic: Clinic, planted: dict[str, Any], about: str, level: Level, words: str
) -> None:
    await clinic.plant(**planted)
    try:
        found = await clinic.says()
    finally:
        await clinic.plant(permissions=PERMISSIONS, synchronized=True, disabled=[], offline=[], bolt11_minutes=None)
    assert found[about].level is level
    assert words in found[about].found
    assert found[about].help
    assert await clinic.says() == {}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"enabled": False}, "is disabled"),
        ({"url": "http://127.0.0.1:9/webhooks/btcpay"}, "has no webhook to"),
        ({"authorizedEvents": {"everything": False, "specificEvents": ["InvoiceSettled"]}}, "not told of InvoiceExpired"),
    ],
)  # fmt: skip
async def test_a_webhook_that_tells_us_nothing_is_found(clinic: Clinic, changed: dict[str, Any], words: str) -> None:
    await clinic.hook(**changed)
    try:
        found = (await clinic.says())["btcpay.webhook"]
    finally:
        await clinic.hook(url=f"{clinic.house.settings.public_url}/webhooks/btcpay")
    assert (found.level, words in found.found) == (FAULT, True), found


async def test_a_webhook_s_secret_is_known_to_be_wrong_once_it_was_used(clinic: Clinic) -> None:
    await clinic.hook(secret="another-secret-altogether")
    await clinic.is_delivered()
    found = await clinic.says()
    await clinic.hook(secret=clinic.house.settings.btcpay_webhook_secret)
    await clinic.is_delivered()
    assert found["btcpay.webhook"].level is FAULT
    assert "its secret is not BTCPAY_WEBHOOK_SECRET" in found["btcpay.webhook"].found
    assert await clinic.says() == {}


async def test_a_webhook_that_is_not_delivered_or_not_repeated_is_found() -> None:
    hook = Hook("http://us/webhooks/btcpay", True, True, None, None, datetime.now(UTC))
    assert "got no answer" in hook_line([hook], {hook.url}, None).found
    assert "got HTTP 502" in hook_line([replace(hook, last_code=502)], {hook.url}, None).found
    found = hook_line([replace(hook, is_repeated=False, last_code=200)], {hook.url}, 3.0)
    assert (found.level, "does not repeat" in found.found) == (WARNING, True)
    unseen = hook_line(None, {hook.url}, None)
    assert (unseen.level, "none has ever come" in unseen.found) == (WARNING, True)
    assert hook_line(None, {hook.url}, 7200.0) == Line("btcpay.webhook", OK, "our key may not see the store's webhooks; of genuine ones the last came 2 hours ago")  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "words"), [("refuse", "could not be reached"), ("error", "HTTP 503"), ("rubbish", "rubbish")]
)
async def test_a_backend_that_is_down_is_found_and_the_rest_is_looked_at(clinic: Clinic, mode: str, words: str) -> None:
    await clinic.world.post("/sandbox/down", json={"mode": mode})
    try:
        found = await clinic.says(database_pool=3)  # a house whose breaker has not met this backend yet
    finally:
        await clinic.world.post("/sandbox/down", json={"mode": "off"})
    assert (found["btcpay.reach"].level, words in found["btcpay.reach"].found) == (FAULT, True), found["btcpay.reach"]
    assert not {"database", "disk", "public_url"} & set(found)


async def test_a_wrong_key_and_a_wrong_store_are_found_without_showing_either(clinic: Clinic) -> None:
    for changed in ({"btcpay_api_key": "k" * 40}, {"btcpay_store_id": "another"}):
        found = await clinic.says(**changed)
        assert [line.level for line in found.values() if line.about in ("btcpay.reach", "btcpay.permissions")] == [
            FAULT
        ]
        assert "k" * 40 not in str(found)


async def test_a_coin_without_a_rate_is_found(clinic: Clinic) -> None:
    await clinic.world.post("/sandbox/rates", json={"LTC_USD": None})
    found = await clinic.says()
    await clinic.world.post("/sandbox/rates", json={"LTC_USD": "80"})
    assert "Rate unavailable" in found["method.ltc"].found


async def test_rates_are_compared_with_a_second_source(clinic: Clinic) -> None:
    far = await clinic.says(rate_fixed=(("BTC", "60000"),))
    assert {name for name, line in far.items() if line.level is FAULT} == {"rate.BTC", "rate.LBTC"}
    assert "8.3 % apart" in far["rate.BTC"].found
    near = await clinic.says(rate_fixed=(("BTC", "63500"), ("LTC", "80")))
    assert {name for name, line in near.items() if line.level is WARNING} == {"rate.BTC", "rate.LBTC"}
    assert await clinic.says(rate_fixed=(("BTC", "65001"),)) == {}


@pytest.mark.parametrize(
    ("theirs", "level"), [("100", OK), ("98", WARNING), ("102.5", WARNING), ("94", FAULT), ("106", FAULT)]
)
def test_a_rate_is_judged_by_how_far_it_is_off(theirs: str, level: Level) -> None:
    assert rate_line("BTC", Decimal(100), Decimal(theirs)).level is level


def test_a_key_of_the_whole_server_is_told_from_one_of_our_store() -> None:
    exact = [f"{permission}:ours" for permission in LEAST_PERMISSIONS]
    assert permissions_line(exact, "ours").level is OK
    assert permissions_line(exact[:2] + exact[3:], "ours").level is OK  # webhooks are not needed
    assert permissions_line(list(LEAST_PERMISSIONS), "ours").level is WARNING
    assert permissions_line([*exact, "btcpay.server.canmodifyserversettings"], "ours").level is FAULT
    assert permissions_line([f"{permission}:theirs" for permission in LEAST_PERMISSIONS], "ours").level is FAULT
    assert permissions_line([*exact, "btcpay.store.canmodifyinvoices:theirs"], "ours").level is WARNING


# --- in the database ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planted", "mended", "about", "words"),
    [
        ("GRANT DELETE ON entry TO satmeter_runtime", "REVOKE DELETE ON entry FROM satmeter_runtime", "database.role", "may change or delete"),
        ("REVOKE INSERT ON entry FROM satmeter_runtime", "GRANT INSERT ON entry TO satmeter_runtime", "database.role", "may not write"),
        ("DELETE FROM alembic_version", f"INSERT INTO alembic_version VALUES ('{head()}')", "database", "run `python -m app migrate`"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_the_database_is_found(
    clinic: Clinic, planted: str, mended: str, about: str, words: str
) -> None:
    clinic.sql(planted)
    try:
        found = await clinic.says()
    finally:
        clinic.sql(mended)
    assert (found[about].level, words in str(found[about])) == (FAULT, True), found
    assert await clinic.says() == {}


@pytest.mark.parametrize(
    ("setting", "words"),
    [("default_transaction_read_only = on", "takes no writes"), ("synchronous_commit = off", "a crash loses")],
)
async def test_a_database_that_takes_no_writes_or_loses_them_is_found(clinic: Clinic, setting: str, words: str) -> None:
    name = psycopg.conninfo.conninfo_to_dict(clinic.url)["dbname"]
    clinic.sql(f'ALTER DATABASE "{name}" SET {setting}')
    try:
        found = await clinic.says()
    finally:
        with psycopg.connect(clinic.url, autocommit=True) as conn:
            conn.execute("SET default_transaction_read_only = off")
            conn.execute(f'ALTER DATABASE "{name}" RESET {setting.split()[0]}'.encode())
    assert (found["database.writes"].level, words in found["database.writes"].found) == (FAULT, True)


async def test_a_database_that_is_away_is_found_and_the_rest_is_looked_at(clinic: Clinic) -> None:
    found = await clinic.says(database_url="postgresql://satmeter:secret-word@127.0.0.1:9/satmeter?connect_timeout=2")
    assert (found["database"].level, "cannot be reached" in found["database"].found) == (FAULT, True)
    assert "secret-word" not in str(found)
    assert not any(name.startswith("method.") for name in found)


async def test_too_few_connections_a_superuser_and_no_archive_are_told(clinic: Clinic) -> None:
    found = await clinic.says(database_pool=200, database_url=clinic.url, environment="production")
    assert found["database.connections"].level is WARNING
    assert found["database.role"].level is WARNING
    assert found["database.backup"].level is WARNING


def test_a_clock_that_is_off_and_a_database_that_is_far_are_found() -> None:
    assert [clock_line(seconds).level for seconds in (0.1, 5, 60)] == [OK, WARNING, FAULT]
    assert [latency_line(ms).level for ms in (0.4, 45)] == [OK, WARNING]
    assert _is_elsewhere("postgresql://u@db.internal/s")
    assert not _is_elsewhere("postgresql://u@/s?host=/run/postgresql")


def test_a_standby_that_is_none_of_ours_or_late_is_found() -> None:
    lines = [standby_line(*each) for each in ((True, True, 0), (True, True, 4.2), (True, True, 7200), (True, True, None), (False, True, 0), (True, False, 0))]  # fmt: skip
    assert [line.level for line in lines] == [OK, OK, WARNING, WARNING, WARNING, FAULT]
    assert "2 hours late" in lines[2].found


async def test_a_read_url_that_leads_nowhere_or_to_the_primary_is_found(clinic: Clinic) -> None:
    gone = await clinic.says(database_read_url="postgresql://nobody@127.0.0.1:9/none")
    assert "cannot be asked (OperationalError)" in gone["database.standby"].found
    same = await clinic.says(database_read_url=clinic.url)
    assert "leads to no standby" in same["database.standby"].found
    assert "database.standby" not in await clinic.says()


# --- the way out, and in ------------------------------------------------------------------------------


async def test_a_relay_that_cannot_be_reached_is_found(clinic: Clinic) -> None:
    alone = await clinic.says(
        sandbox_port=9, btcpay_url=clinic.house.settings.sandbox_url, nwc_allow_private_relays=True
    )
    assert alone == {} or set(alone) <= {
        "relays",
        "rate.BTC",
        "rate.LBTC",
    }  # public relays, where this machine reaches them
    account = uuid.uuid4()
    relays = [f"ws{clinic.house.settings.sandbox_url[4:]}/relay", "ws://127.0.0.1:9/"]
    clinic.conn.execute("INSERT INTO account (id) VALUES (%s)", [account])
    clinic.conn.execute(
        """INSERT INTO nwc_connection (account_id, id, wallet_pubkey, relays, encryption, can_look_up, sealed_secret,
               threshold_nusd, topup_amount_nusd) VALUES (%s, %s, 'p', %s, 'nip44_v2', false, 's', 1, 1)""",
        [account, account, relays],
    )
    some = await clinic.says()
    clinic.conn.execute("UPDATE nwc_connection SET relays = %s", [relays[1:]])
    none = await clinic.says()
    clinic.conn.execute("DELETE FROM nwc_connection")
    assert (some["relays"].level, none["relays"].level) == (WARNING, FAULT)
    assert "127.0.0.1:9" in some["relays"].found


async def test_a_public_url_that_leads_nowhere_or_to_somebody_else_is_found(clinic: Clinic) -> None:
    nowhere = (await clinic.says(public_url="http://127.0.0.1:9"))["public_url"]
    assert (nowhere.level, "does not answer" in nowhere.found) == (FAULT, True)
    other = (await clinic.says(public_url=clinic.house.settings.sandbox_url))["public_url"]
    assert (other.level, "somebody else answers: HTTP/1.1 404" in other.found) == (FAULT, True)


def test_a_certificate_s_days_are_counted() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert days_left({"notAfter": "Jan 11 00:00:00 2030 GMT"}, now) == 10
    assert ssl.cert_time_to_seconds("Jan  1 00:00:00 2030 GMT") == now.timestamp()


# --- the machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free_bytes", "level"), [(50e9, OK), (12e9, WARNING), (4e9, FAULT)])
def test_a_disk_that_fills_is_found(free_bytes: float, level: Level) -> None:
    assert disk_line("/data", 100 * 10**9, int(free_bytes)).level is level


async def test_a_spool_that_stands_still_and_calls_that_were_refused_are_found(clinic: Clinic) -> None:
    folder = clinic.house.settings.data_dir / "gateway" / "spool"
    folder.mkdir(parents=True)
    made = SpoolFile(None)
    made.append(Owed("one", "settle", msgspec_raw({"hold_id": "h"})))
    (folder / "1-x.spool").write_bytes(b"".join(line for lines in made.live.values() for line in lines.values()))
    assert await clinic.says() == {}  # it was written just now
    os.utime(folder / "1-x.spool", (time.time() - 7200,) * 2)
    (folder / "refused.jsonl").write_text("{}\n{}\n")
    found = await clinic.says()
    shutil.rmtree(folder.parent)
    assert (found["gateway.spool"].level, "1 calls are not told" in found["gateway.spool"].found) == (FAULT, True)
    assert (found["gateway.refused"].level, "2 calls" in found["gateway.refused"].found) == (WARNING, True)


def msgspec_raw(body: Any) -> Any:
    return msgspec.Raw(json.dumps(body).encode())


async def test_secrets_under_an_older_key_and_old_tokens_are_found(clinic: Clinic) -> None:
    settings = clinic.house.settings
    async with httpx.AsyncClient(base_url=settings.public_url, trust_env=False) as client:
        assert (await client.post("/accounts/create")).status_code == 201
    name = f"p{uuid.uuid4().hex[:6]}"
    await create_token(clinic.house.db, settings.pepper, "service", name)
    await create_token(clinic.house.db, settings.pepper, "admin", name)
    clinic.sql(f"UPDATE service_token SET created_at = now() - interval '400 days' WHERE name = '{name}'")
    clinic.sql(f"UPDATE admin_token SET expires_at = now() + interval '3 days' WHERE name = '{name}'")
    found = await clinic.says(sealing_keys=(("k9", os.urandom(32)), *settings.sealing_keys))
    clinic.sql("UPDATE service_token SET revoked_at = now(); UPDATE admin_token SET revoked_at = now()")
    assert "1 secrets are sealed under an older key" in found["secrets.sealing"].found
    assert "400 days old" in found["token.service"].found
    assert "expires in 3 days" in found["token.admin"].found


def test_a_token_that_expired_and_a_key_that_is_not_needed_are_found() -> None:
    expired = token_line("admin", "ann", 91, -1)
    assert expired is not None
    assert "has expired" in expired.found
    assert token_line("admin", "ann", 1, 89) is None
    assert [sealing_line(0, keys).level for keys in (1, 2)] == [OK, WARNING]


# --- the traffic --------------------------------------------------------------------------------------


async def test_a_proxy_that_asks_and_does_not_settle_is_found(clinic: Clinic) -> None:
    settings, name = clinic.house.settings, f"p{uuid.uuid4().hex[:6]}"
    token = await create_token(clinic.house.db, settings.pepper, "service", name)
    async with httpx.AsyncClient(base_url=settings.public_url, trust_env=False) as client:
        key = (await client.post("/accounts/create")).json()["api_key"]
        clinic.sql("UPDATE account SET posted_nusd = 1000000000")
        for number in range(3):
            body = {"request_id": f"r{number}", "api_key": key, "max_cost_usd": "0.01", "model": "m", "endpoint": "e"}
            answer = await client.post("/v1/meter/authorize", headers={"Authorization": f"Bearer {token}"}, json=body)
            assert answer.json()["decision"] == "allow", answer.text
    assert await clinic.says() == {}  # it asked just now
    clinic.sql("UPDATE hold SET created_at = now() - interval '2 hours' WHERE request_id = 'r0'")
    clinic.sql("UPDATE hold SET created_at = now() - interval '30 minutes' WHERE request_id <> 'r0'")
    asking = (await clinic.says())[f"proxy.{name}"]
    clinic.sql("UPDATE hold SET created_at = now() - interval '3 hours'")
    silent = (await clinic.says())[f"proxy.{name}"]
    clinic.sql("UPDATE service_token SET revoked_at = now()")
    assert (asking.level, "never settled, and asked for 2 calls" in asking.found) == (FAULT, True)
    assert silent.level is WARNING
    assert await clinic.says() == {}
    clinic.sql("DELETE FROM hold; UPDATE account SET posted_nusd = 0, held_nusd = 0; UPDATE api_key SET held_nusd = 0")


def test_a_proxy_that_settles_is_well() -> None:
    assert proxy_line("p", 30.0, 9000.0, 1.0, 4).level is OK
    assert proxy_line("p", 4000.0, 9000.0, 10.0, 0).level is WARNING


async def test_jobs_that_stand_still_and_reviews_are_found(clinic: Clinic) -> None:
    account, topup = uuid.uuid4(), uuid.uuid4()
    clinic.conn.execute("INSERT INTO account (id) VALUES (%s)", [account])
    clinic.conn.execute(
        """INSERT INTO topup (account_id, id, backend, method, currency, amount_units, expires_at, watch_until, next_check_at,
               review) VALUES (%s, %s, 'btcpay', 'btc', 'USD', 1, now(), now(), now() - interval '1 hour', 'odd')""",
        [account, topup],
    )
    found = await clinic.says()
    clinic.sql("DELETE FROM topup")
    assert (found["jobs"].level, "1 top-ups were not asked about" in found["jobs"].found) == (FAULT, True)
    assert (found["reviews"].level, "1 top-ups wait" in found["reviews"].found) == (WARNING, True)


# --- as a command -------------------------------------------------------------------------------------


def test_a_line_says_how_bad_it_is_what_was_found_and_what_would_help() -> None:
    line = Line("disk", WARNING, "2 GB free", "make room")
    assert str(line).split() == ["warning", "disk", "2", "GB", "free:", "make", "room"]
    assert [exit_code([Line("a", level, "")]) for level in (OK, WARNING, FAULT)] == [0, 1, 2]
    assert [duration(seconds) for seconds in (1, 150, 7200, 260_000)] == ["1 seconds", "2 minutes", "2 hours", "3 days"]


async def test_no_secret_is_ever_said(clinic: Clinic) -> None:
    settings = clinic.house.settings
    told = str(await examine(clinic.house, clinic.url))
    for secret in (
        settings.secret_pepper,
        settings.btcpay_api_key,
        settings.btcpay_webhook_secret,
        new_secret("svc")[:4],
    ):
        assert secret not in told
