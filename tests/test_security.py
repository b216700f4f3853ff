"""Secrets: how they look, how they are kept, and that they are nowhere else."""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import logging
import re
import secrets
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.accounts.accounts import OpenedAccount
from app.kernel import logs
from app.kernel.security import (
    BASE62,
    Pepper,
    Resealed,
    Sealer,
    UnsealError,
    canonical_credit_id,
    equal,
    is_wellformed,
    new_credit_id,
    new_secret,
    preview,
)
from app.kernel.settings import Settings, SettingsError, load
from app.keys.issue import Keyring, reseal_all
from app.wiring import House
from tests.door import JSON, Door, idempotency_key, opened
from tests.rig import Customer

OLD, NEW = ("old1", bytes(range(32))), ("new2", bytes(range(32, 64)))


# --- API keys and tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["sk", "svc", "adm"])
def test_a_secret_is_a_prefix_43_base62_digits_and_a_checksum(prefix: str) -> None:
    made = {new_secret(prefix) for _ in range(500)}
    assert len(made) == 500
    assert all(re.fullmatch(rf"{prefix}-[0-9A-Za-z]{{49}}", secret) for secret in made)
    assert all(is_wellformed(secret, prefix) for secret in made)
    assert not any(is_wellformed(secret, other) for secret in made for other in {"sk", "svc", "adm"} - {prefix})


@given(st.integers(3, 51), st.sampled_from(BASE62), st.sampled_from([new_secret("sk") for _ in range(20)]))
def test_every_typo_of_one_character_is_seen(at: int, digit: str, key: str) -> None:
    assert is_wellformed(key[:at] + digit + key[at + 1 :], "sk") == (key[at] == digit)


@given(st.integers(3, 50), st.sampled_from([new_secret("sk") for _ in range(20)]))
def test_every_swap_of_two_neighbours_is_seen(at: int, key: str) -> None:
    swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    assert is_wellformed(swapped, "sk") == (swapped == key)


@given(st.text(max_size=60))
def test_any_other_text_is_no_key_and_no_credit_id(text: str) -> None:
    assert not is_wellformed(text, "sk")
    assert canonical_credit_id(text) is None


def test_a_key_in_other_spellings_is_no_key() -> None:
    key = new_secret("sk")
    for other in (
        key.upper(),
        key.lower(),
        f" {key}",
        f"{key}\n",
        key + "0",
        key[:-1],
        key.replace("-", ""),
        "SK" + key[2:],
        key.replace("-", "‐"),
    ):
        assert not is_wellformed(other, "sk"), other


def test_a_preview_gives_seven_random_characters_away_and_no_more() -> None:
    key = new_secret("sk")
    assert preview(key) == f"{key[:6]}…{key[-4:]}"
    assert len(preview(key)) == 11


def test_a_credit_id_is_a_random_uuid_in_its_one_spelling() -> None:
    credit_id = new_credit_id()
    assert uuid.UUID(credit_id).version == 4
    assert canonical_credit_id(credit_id.upper()) == credit_id
    for other in (
        f"{{{credit_id}}}",
        f"urn:uuid:{credit_id}",
        credit_id.replace("-", ""),
        str(uuid.uuid1()),
        f"{credit_id}\n",
        f" {credit_id}",
    ):
        assert canonical_credit_id(other) is None, other


# --- lookup hashes ------------------------------------------------------------------------------------------


def test_a_lookup_hash_is_another_under_another_pepper() -> None:
    key = new_secret("sk")
    one, other = Pepper(b"a" * 32), Pepper(b"b" * 32)
    assert one.lookup(key) == Pepper(b"a" * 32).lookup(key)
    assert one.lookup(key) != other.lookup(key)
    assert one.lookup(key) == one.lookup_hashed(hashlib.sha256(key.encode()).digest())
    assert one.lookup(key) not in (hashlib.sha256(key.encode()).digest(), key.encode())
    assert equal(one.lookup(key), one.lookup(key))


def test_a_tag_is_another_for_another_purpose_and_for_parts_cut_elsewhere() -> None:
    pepper = Pepper(b"a" * 32)
    assert pepper.tag(b"hold", b"a", b"b") != pepper.tag(b"receipt", b"a", b"b")
    assert pepper.tag(b"hold", b"ab", b"c") != pepper.tag(b"hold", b"a", b"bc")
    assert pepper.tag(b"hold", b"ab") != pepper.tag(b"hold", b"ab", b"")


def test_a_short_pepper_is_refused() -> None:
    with pytest.raises(AssertionError):
        Pepper(b"a" * 31)


# --- sealing --------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.text(max_size=50))
def test_what_is_sealed_opens_for_its_row(plaintext: bytes, row: str) -> None:
    sealer = Sealer([NEW])
    assert sealer.open(sealer.seal(plaintext, row), row) == plaintext


def test_a_sealed_value_is_never_twice_the_same_and_hides_what_is_in_it() -> None:
    sealer = Sealer([NEW])
    one, other = sealer.seal(b"secret", "r"), sealer.seal(b"secret", "r")
    assert one != other
    assert b"secret".hex() not in one
    assert one.startswith("new2.")


def test_a_sealed_value_moved_altered_or_under_another_key_does_not_open() -> None:
    sealer = Sealer([NEW, OLD])
    sealed = sealer.seal(b"secret", "api_key/a/1")
    broken = [
        (sealed, "api_key/a/2"), (sealed, "api_key/b/1"), (sealed, ""), (sealed.replace("new2", "old1"), "api_key/a/1"), (sealed[:-2], "api_key/a/1"),
        (sealed + "00", "api_key/a/1"), (sealed.replace("new2", "gone"), "api_key/a/1"), ("", "api_key/a/1"), ("new2.", "api_key/a/1"),
        ("new2.zz", "api_key/a/1"), (sealed[:10] + ("0" if sealed[10] != "0" else "1") + sealed[11:], "api_key/a/1"),
    ]  # fmt: skip
    for value, row in broken:
        with pytest.raises(UnsealError) as caught:
            sealer.open(value, row)
        assert "secret" not in str(caught.value)
    with pytest.raises(UnsealError):
        Sealer([("new2", OLD[1])]).open(sealed, "api_key/a/1")


def test_the_first_key_seals_and_every_key_opens() -> None:
    old, both = Sealer([OLD]), Sealer([NEW, OLD])
    sealed = old.seal(b"secret", "r")
    assert both.open(sealed, "r") == b"secret"
    assert (both.is_current(sealed), both.is_current(both.seal(b"x", "r")), both.current_id) == (False, True, "new2")
    with pytest.raises(UnsealError):
        old.open(both.seal(b"secret", "r"), "r")


# --- rotation, in the database ---------------------------------------------------------------------------------


def _sealed_by(settings: Settings, *keys: tuple[str, bytes], reveal: bool = True) -> Settings:
    return replace(settings, sealing_keys=keys, key_reveal=reveal)


async def _some_keys(door: Door) -> dict[str, str]:
    """Three live keys by id, and a revoked one."""
    customer = await door.customer()
    made = [await door.rig.new_key(customer) for _ in range(3)]
    await door.ask("DELETE", f"/keys/{made[0]['_id']}", customer.owner)
    return {key["_id"]: key["api_key"] for key in made[1:]} | {"credit_id": customer.credit_id}


async def _shown(door: Door, credit_id: str) -> dict[str, str | None]:
    listed = (await door.ask("GET", "/keys?show_key=true", {"x-credit-id": credit_id})).json["data"]
    return {key["_id"]: key.get("api_key") for key in listed}


def _rows(door: Door) -> Any:
    return door.rig.sql("SELECT to_jsonb(k) - 'sealed_secret' FROM api_key k ORDER BY id"), door.rig.sql(
        "SELECT * FROM credential ORDER BY 1"
    )


async def test_rotation_seals_every_kept_secret_anew_and_changes_nothing_else(clean: str, settings: Settings) -> None:
    async with opened(clean, _sealed_by(settings, OLD)) as door:
        keys = await _some_keys(door)
        before = _rows(door)
    async with opened(clean, _sealed_by(settings, NEW, OLD)) as door:
        credit_id = keys.pop("credit_id")
        assert (await _shown(door, credit_id)).items() >= keys.items()  # the old key still opens
        assert await reseal_all(door.rig.house.db, door.rig.house.keyring) == Resealed(3)
        assert await reseal_all(door.rig.house.db, door.rig.house.keyring) == Resealed()
        assert _rows(door) == before
        assert door.rig.sql("SELECT count(*) FROM api_key WHERE sealed_secret NOT LIKE 'new2.%%'") == [(0,)]
        assert door.rig.sql("SELECT count(*) FROM api_key WHERE deleted_at IS NOT NULL AND sealed_secret IS NULL") == [
            (1,)
        ]
    async with opened(clean, _sealed_by(settings, NEW)) as door:
        assert (await _shown(door, credit_id)).items() >= keys.items()  # the old one is no longer needed


async def test_while_secrets_are_sealed_anew_every_one_of_them_is_shown_and_spends(
    clean: str, settings: Settings
) -> None:
    async with opened(clean, _sealed_by(settings, OLD)) as door:
        keys = await _some_keys(door)
        credit_id = keys.pop("credit_id")
        await door.rig.fund(Customer(credit_id, next(iter(keys.values()))), "20")
    async with opened(clean, _sealed_by(settings, NEW, OLD)) as door:
        is_over = asyncio.Event()

        async def show() -> int:
            times = 0
            while not is_over.is_set() or times < 3:
                assert (await _shown(door, credit_id)).items() >= keys.items()
                for key in keys.values():
                    assert (await door.rig.authorize(key, "0.0001"))["decision"] == "allow"
                times += 1
            return times

        shown = asyncio.gather(*(show() for _ in range(4)))
        await asyncio.sleep(0)
        assert await reseal_all(door.rig.house.db, door.rig.house.keyring) == Resealed(3)
        is_over.set()
        assert min(await shown) >= 3


async def test_a_secret_that_does_not_open_is_counted_and_keeps_no_other_from_being_sealed_anew(
    clean: str, settings: Settings
) -> None:
    async with opened(clean, _sealed_by(settings, OLD)) as door:
        await _some_keys(door)
    async with opened(clean, _sealed_by(settings, NEW, OLD)) as door:
        spoilt = "(SELECT id FROM api_key WHERE sealed_secret IS NOT NULL ORDER BY account_id, id LIMIT 1)"
        door.rig.sql(f"UPDATE api_key SET sealed_secret = 'lost.00' WHERE id = {spoilt}")
        assert await reseal_all(door.rig.house.db, door.rig.house.keyring) == Resealed(2, unreadable=1)
        assert await reseal_all(door.rig.house.db, door.rig.house.keyring) == Resealed(0, unreadable=1)
        assert door.rig.sql("SELECT count(*) FROM api_key WHERE sealed_secret LIKE 'new2.%%'") == [(2,)]
        door.rig.sql("UPDATE api_key SET sealed_secret = NULL WHERE sealed_secret = 'lost.00'")  # the audit would tell


async def test_with_key_reveal_off_rotation_forgets_and_keys_still_work(clean: str, settings: Settings) -> None:
    async with opened(clean, _sealed_by(settings, OLD)) as door:
        keys = await _some_keys(door)
    async with opened(clean, _sealed_by(settings, OLD, reveal=False)) as door:
        credit_id = keys.pop("credit_id")
        assert set((await _shown(door, credit_id)).values()) == {None}
        before = _rows(door)
        assert await reseal_all(door.rig.house.db, door.rig.house.keyring) == Resealed(3)
        assert _rows(door) == before
        await _some_keys(door)
        assert door.rig.sql("SELECT count(*) FROM api_key WHERE sealed_secret IS NOT NULL") == [(0,)]
        for key in keys.values():
            assert (await door.ask("GET", "/credits/balance", {"Authorization": f"Bearer {key}"})).status == 200


async def test_a_sealed_secret_moved_to_another_keys_row_does_not_open_there(clean: str, settings: Settings) -> None:
    async with opened(clean, settings) as door:
        victim, thief = await door.customer(), await door.customer()
        theirs, mine = await door.rig.new_key(victim), await door.rig.new_key(thief)
        door.rig.sql(
            "UPDATE api_key SET sealed_secret = (SELECT sealed_secret FROM api_key WHERE id = %s) WHERE id = %s",
            theirs["_id"], mine["_id"],
        )  # fmt: skip
        answer = await door.ask("GET", f"/keys/{mine['_id']}?show_key=true", thief.owner)
        assert (answer.status, answer.json["data"]["api_key"]) == (200, None)
        assert theirs["api_key"] not in answer.body.decode()
        assert (await door.ask("GET", f"/keys/{mine['_id']}", thief.owner)).status == 200
        door.rig.sql("UPDATE api_key SET sealed_secret = NULL")  # which the audit at the end would tell


async def test_a_credit_id_made_another_account_s_opens_neither(clean: str, settings: Settings) -> None:
    """With it would go all keys of that account, which it may see."""
    async with opened(clean, settings) as door:
        victim, thief = await door.customer(), await door.customer()
        swap = """UPDATE credential c SET account_id = o.account_id FROM credential o
                  WHERE c.kind = 'credit_id' AND o.kind = 'credit_id' AND o.secret_hash <> c.secret_hash"""
        door.rig.sql(swap)
        for caller in (victim, thief):
            answer = await door.ask("GET", "/keys?show_key=true", caller.owner)
            assert (answer.status, answer.code) == (401, "invalid_credit_id")
        door.rig.sql(swap)
        assert (await door.ask("GET", "/keys?show_key=true", thief.owner)).status == 200


# --- nothing is said by accident ---------------------------------------------------------------------------------


def test_no_repr_shows_a_secret(settings: Settings, house: House) -> None:
    pepper = settings.secret_pepper
    shown = [
        repr(settings),
        str(settings),
        repr(settings.pepper),
        repr(settings.sealer),
        repr(house),
        repr(house.keyring),
        repr(house.verifier),
    ]
    shown += [
        repr(OpenedAccount(uuid.uuid4(), "the-credit-id", "the-api-key")),
        f"{settings!r:.2000}",
        repr(house.meter),
        repr(house.gateways),
    ]
    planted = [pepper, settings.btcpay_api_key, settings.btcpay_webhook_secret, "the-credit-id", "the-api-key"]
    planted += [base64.b64encode(key).decode() for _, key in settings.sealing_keys] + [
        repr(key) for _, key in settings.sealing_keys
    ]
    for text in shown:
        assert [secret for secret in planted if secret and secret in text] == []


def test_a_settings_error_does_not_quote_the_secret_that_is_wrong() -> None:
    for name, value in (
        ("SECRET_PEPPER", "hunter2hunter2"),
        ("SEALING_KEYS", "k1:hunter2hunter2"),
        ("SEALING_KEYS", "hunter2hunter2"),
    ):
        with pytest.raises(SettingsError) as caught:
            load(
                {
                    "DATA_DIR": "/nonexistent/nowhere",
                    "SECRET_PEPPER": "x" * 40,
                    "SEALING_KEYS": f"k:{base64.b64encode(bytes(32)).decode()}",
                }
                | _PRODUCTION
                | {name: value}
            )
        assert "hunter2" not in str(caught.value)
        assert name in str(caught.value)


_PRODUCTION = {
    "ENVIRONMENT": "production", "DATABASE_URL": "postgresql://u@h/d", "PUBLIC_URL": "https://example.com", "BTCPAY_URL": "https://btcpay.example.com",
    "BTCPAY_API_KEY": "x" * 20, "BTCPAY_STORE_ID": "x" * 20, "BTCPAY_WEBHOOK_SECRET": "x" * 20,
}  # fmt: skip


@pytest.fixture
def debug_log() -> Iterator[io.StringIO]:
    """Every log line there can be, as the running program would print it; libraries at DEBUG too."""
    root, printed = logging.getLogger(), io.StringIO()
    handlers, level, root.handlers = root.handlers[:], root.level, []
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        logs.configure("DEBUG")
        root.setLevel(logging.DEBUG)
        yield printed
    root.handlers = handlers
    root.setLevel(level)


async def test_no_secret_is_in_any_log_line_error_or_table(
    clean: str, settings: Settings, debug_log: io.StringIO
) -> None:
    planted = replace(settings, btcpay_webhook_secret=secrets.token_urlsafe(24), btcpay_api_key=secrets.token_hex(20))
    answers: list[bytes] = []
    async with opened(clean, planted) as door:

        async def keep(method: str, target: str, headers: Mapping[str, str | bytes], body: Any = None) -> None:
            sent = None if body is None else json.dumps(body).encode()
            answers.append((await door.ask(method, target, {**headers, **JSON}, sent)).body)

        customer, service = await door.customer("20"), await door.service()
        admin = await door.admin()
        key = (await door.ask("POST", "/keys", customer.owner | JSON | idempotency_key(), b'{"name": "canary"}')).json[
            "data"
        ]["api_key"]
        account = (await door.ask("POST", "/accounts/create", idempotency_key())).json
        call = {"request_id": "canary", "api_key": key, "cost_usd": 0.01}
        assert (await door.ask("POST", "/v1/meter/charge", service | JSON, json.dumps(call).encode())).status == 200
        await door.ask("POST", "/credits/balance", JSON, json.dumps({"credit_id": customer.credit_id}).encode())
        await door.rig.poll()
        watched = door.secrets | {
            key,
            account["api_key"],
            account["credit_id"],
            planted.secret_pepper,
            planted.btcpay_webhook_secret,
        }
        watched |= {planted.btcpay_api_key, *(base64.b64encode(key).decode() for _, key in planted.sealing_keys)}

        for secret in (
            customer.credit_id,
            customer.api_key,
            key,
            service["Authorization"][7:],
            admin["Authorization"][7:],
        ):
            wrong = secret + "x"
            bad: tuple[dict[str, str | bytes], ...] = (
                {"x-credit-id": wrong}, {"Authorization": f"Bearer {wrong}"}, {"x-api-key": wrong}, {"Idempotency-Key": f"{secret} {secret}"}
            )  # fmt: skip
            for headers in bad:
                for target in ("/keys", "/topups", "/admin/topups"):
                    await keep("GET", target, headers)
                for target in ("/accounts/create", "/v1/meter/settle"):
                    await keep("POST", target, headers, {})
            for prefix in ("/keys/", "/topup/status/", "/receipts/", "/", "/topups?cursor=", "/webhooks/"):
                await keep("GET", prefix + secret, {"x-credit-id": customer.credit_id})
            for body in (
                {"hold_id": secret, "cost_usd": 1},
                {"hold_id": [secret], "cost_usd": 1},
                {"hold_id": "x", "cost_usd": secret},
            ):
                await keep("POST", "/v1/meter/settle", service, body)
            await keep("POST", "/v1/meter/charge", service, call | {"api_key": secret, "request_id": "w"})

        async def broken(*_: object) -> None:
            raise RuntimeError(" ".join(sorted(watched)))

        door.rig.btcpay.create = broken  # type: ignore[method-assign,assignment]
        answers.append((await door.ask("POST", "/topup/create/btc", customer.key | JSON, b'{"amount": 20}')).body)
        tables = [name for (name,) in door.rig.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        kept = "\n".join(str(row) for table in tables for row in door.rig.sql(f"SELECT t::text FROM {table} t"))

    printed = debug_log.getvalue()
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {line["event"] for line in lines} >= {"request", "request.defect"}
    assert {name for line in lines for name in line} <= logs.ALLOWED_FIELDS
    texts = {"log": printed, "answers": b"\n".join(answers).decode("latin-1"), "tables": kept}
    for secret in watched:
        for spelling in (secret, secret.encode().hex(), base64.b64encode(secret.encode()).decode(), secret.upper()):
            assert [where for where, text in texts.items() if spelling in text] == []
    assert hashlib.sha256(key.encode()).hexdigest() not in kept


async def test_no_text_of_a_callers_own_is_in_a_log_line(
    clean: str, settings: Settings, debug_log: io.StringIO
) -> None:
    text = "their-own-words"
    async with opened(clean, settings) as door:
        customer, service, admin = await door.customer("20"), await door.service(), await door.admin()

        async def post(target: str, headers: Mapping[str, str | bytes], **body: Any) -> Any:
            answer = await door.ask("POST", target, {**headers, **JSON, "User-Agent": text}, json.dumps(body).encode())
            assert answer.status in (200, 201), answer.body
            return answer.json

        call = {"api_key": customer.api_key, "model": text, "endpoint": f"/{text}"}
        held = await post("/v1/meter/authorize", service, request_id=text, max_cost_usd=1, **call)
        await post("/v1/meter/release", service, hold_id=held["hold_id"], reason=text)
        done = {"cost_usd": 1, "served_model": text, "provider": text, "upstream_id": text, "features_used": [text]}
        made = await post("/v1/meter/charge", service, request_id=f"{text}-2", **call, **done)
        await post("/v1/meter/refund", service, charge_id=made["charge_id"], reason=text)
        await post("/keys", customer.owner | {"Idempotency-Key": text}, name=text, allowed_models=[text])
        topup = await door.rig.topup(customer, "20")
        door.rig.sql("UPDATE topup SET review = 'marked' WHERE invoice_id = %s", topup)
        [(topup_id,)] = door.rig.sql("SELECT id FROM topup WHERE invoice_id = %s", topup)
        await post(f"/admin/topups/{topup_id}/resolve", admin, action="dismiss", reason=text)
        for target in (f"/queries/history?model={text}", f"/{text}", f"/keys/{text}", f"/topups?{text}=1"):
            await door.ask("GET", target, customer.owner)
    printed = debug_log.getvalue()
    assert '"event": "meter.refunded"' in printed
    assert text not in printed


def test_a_field_that_is_not_on_the_list_does_not_reach_the_log(debug_log: io.StringIO) -> None:
    logs.log.info("request", credit_id="a-secret", api_key="a-secret", body={"a": "a-secret"}, status=200)
    printed = debug_log.getvalue()
    assert '"status": 200' in printed
    assert "a-secret" not in printed


def test_where_it_broke_says_a_place_and_not_what_was_in_it() -> None:
    with pytest.raises(UnsealError) as caught:
        Sealer([NEW]).open("new2.00", "api_key/a/1")
    assert re.fullmatch(r"[a-z_/]+\.py:\d+", logs.where_it_broke(caught.value))


def test_a_keyring_that_may_not_reveal_keeps_nothing() -> None:
    keyring = Keyring(Pepper(b"a" * 32), Sealer([NEW]), reveal=False)
    account_id, key_id = uuid.uuid4(), uuid.uuid4()
    assert keyring.seal("sk-x", account_id, key_id) is None
    sealed = Keyring(Pepper(b"a" * 32), Sealer([NEW]), reveal=True).seal("sk-x", account_id, key_id)
    assert keyring.open(sealed, account_id, key_id) is None
