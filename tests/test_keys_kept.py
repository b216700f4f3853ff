"""Keys in numbers: how many an account may have, how large one may be, pages of them; and secrets that do not open any more."""

import asyncio
import contextlib
import io
import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from httpx import Response

from app.audit import PROOFS, Secrets, audit
from app.kernel import logs
from app.kernel.security import Sealer
from app.keys import issue
from app.keys.issue import KEY_BYTES
from app.keys.verify import credential_proof
from tests.rig import Customer, Rig

MOST = 1000
LARGE_MODELS = [f"provider/{'m' * 180}-{n:03}" for n in range(200)]


def fill(rig: Rig, customer: Customer, count: int, *, revoked: bool = False) -> None:
    """So many keys as if made before, named by number."""
    rig.sql(
        """INSERT INTO api_key (account_id, id, name, preview, deleted_at)
           SELECT (SELECT account_id FROM api_key WHERE id = %s), gen_random_uuid(), 'k' || n, 'sk-abc…wxyz', CASE WHEN %s THEN now() END
           FROM generate_series(1, %s) n""",
        _first_key_of(rig, customer), revoked, count,
    )  # fmt: skip
    pepper = rig.house.settings.pepper
    found = rig.sql(
        "SELECT account_id, id FROM api_key k WHERE NOT EXISTS (SELECT FROM credential c WHERE c.key_id = k.id)"
    )
    with psycopg.connect(rig.database_url, autocommit=True) as conn, conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO credential (secret_hash, kind, account_id, key_id, proof) VALUES (%s, 'api_key', %s, %s, %s)",
            [
                (
                    key_id.bytes,
                    account_id,
                    key_id,
                    credential_proof(pepper, key_id.bytes, "api_key", account_id, key_id),
                )
                for account_id, key_id in found
            ],
        )


def _first_key_of(rig: Rig, customer: Customer) -> uuid.UUID:
    secret_hash = rig.house.settings.pepper.lookup(customer.api_key)
    [(key_id,)] = rig.sql("SELECT key_id FROM credential WHERE secret_hash = %s", secret_hash)
    assert isinstance(key_id, uuid.UUID)
    return key_id


async def make(rig: Rig, customer: Customer, **wanted: Any) -> Response:
    return await rig.client.post("/keys", headers=customer.owner, json={"name": uuid.uuid4().hex[:20], **wanted})


async def page(rig: Rig, customer: Customer, query: str = "") -> Any:
    answer = await rig.client.get(f"/keys{query}", headers=customer.owner)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """The log as an operator reads it."""
    root, text = logging.getLogger(), io.StringIO()
    handlers = root.handlers[:]
    with contextlib.redirect_stderr(text):
        logs.configure("ERROR")
        yield text
    root.handlers = handlers


# --- how many, how large -----------------------------------------------------------------------------


async def test_an_account_has_a_thousand_live_keys_at_most(rig: Rig) -> None:
    customer = await rig.customer()
    fill(rig, customer, MOST - 2)
    fill(rig, await rig.customer(), 5)  # another's are not counted
    last = await make(rig, customer)
    assert last.status_code == 201
    refused = await make(rig, customer)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_field")
    assert "1000" in refused.json()["message"]
    await rig.client.delete(f"/keys/{last.json()['data']['_id']}", headers=customer.owner)
    assert (await make(rig, customer)).status_code == 201


async def test_keys_made_at_one_moment_do_not_pass_the_cap_together(rig: Rig) -> None:
    customer = await rig.customer()
    fill(rig, customer, MOST - 4)
    answers = await asyncio.gather(*(make(rig, customer) for _ in range(20)))
    assert Counter(answer.status_code for answer in answers) == {201: 3, 422: 17}


async def test_a_key_is_no_larger_than_a_page_of_them_can_bear(rig: Rig) -> None:
    customer = await rig.customer()
    refused = await make(rig, customer, allowed_models=LARGE_MODELS)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "allowed_models")
    made = await make(rig, customer, name="n", allowed_models=["m" * 199] * (KEY_BYTES // 200))
    assert made.status_code == 201
    path = f"/keys/{made.json()['data']['_id']}"
    changed = await rig.client.patch(path, headers=customer.owner, json={"allowed_models": LARGE_MODELS})
    assert (changed.status_code, changed.json()["error"]["param"]) == (422, "allowed_models")
    assert (await rig.client.patch(path, headers=customer.owner, json={"scopes": ["spend"] * 4})).status_code == 200
    assert (
        await rig.client.patch(path, headers=customer.owner, json={"name": "€" * 25})
    ).status_code == 422  # 75 bytes more


async def test_one_that_is_too_large_from_before_can_still_be_disabled(rig: Rig) -> None:
    customer = await rig.customer()
    key_id = _first_key_of(rig, customer)
    rig.sql("UPDATE api_key SET allowed_models = %s WHERE id = %s", LARGE_MODELS, key_id)
    answer = await rig.client.patch(f"/keys/{key_id}", headers=customer.owner, json={"disabled": True})
    assert (answer.status_code, answer.json()["data"]["disabled"]) == (200, True)


async def test_the_largest_answer_is_half_a_megabyte(rig: Rig) -> None:
    customer = await rig.customer()
    fill(rig, customer, MOST - 1)
    rig.sql("UPDATE api_key SET allowed_models = %s", ["m" * 199] * (KEY_BYTES // 200))
    answer = await rig.client.get("/keys?show_key=true", headers=customer.owner)
    print(f"GET /keys of 1,000 keys of 4 kB: {len(answer.content)} bytes")
    assert len(answer.content) < 500_000


# --- pages ---------------------------------------------------------------------------------------------


async def test_few_keys_come_in_one_answer_as_ever(rig: Rig) -> None:
    customer = await rig.customer()
    fill(rig, customer, 99)
    listed = await page(rig, customer)
    assert (len(listed["data"]), listed["next_cursor"], listed["status"]) == (100, None, "success")


@pytest.mark.parametrize(
    ("query", "sizes"), [("", [100, 100, 51]), ("&limit=90", [90, 90, 71]), ("&limit=100", [100, 100, 51])]
)
async def test_many_keys_come_in_pages_each_key_once(rig: Rig, query: str, sizes: list[int]) -> None:
    customer = await rig.customer()
    fill(rig, customer, 250)
    fill(rig, customer, 30, revoked=True)
    seen: list[str] = []
    got, cursor = [], ""
    while True:
        listed = await page(rig, customer, f"?show_key=true{query}{cursor}")
        seen += [key["_id"] for key in listed["data"]]
        got.append(len(listed["data"]))
        if listed["next_cursor"] is None:
            break
        cursor = f"&cursor={listed['next_cursor']}"
    assert (got, len(set(seen))) == (sizes, 251)
    assert len((await page(rig, customer, "?limit=100&include_disabled=true"))["data"]) == 100


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "cursor=nonsense", "cursor="])
async def test_a_page_that_cannot_be_is_refused(rig: Rig, query: str) -> None:
    answer = await rig.client.get(f"/keys?{query}", headers=(await rig.customer()).owner)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, query.partition("=")[0])


# --- kept secrets that do not open -----------------------------------------------------------------------


async def test_a_kept_key_that_does_not_open_is_told_and_hinders_nothing(rig: Rig, printed: io.StringIO) -> None:
    """Its row's secret was moved here from another key."""
    customer = await rig.customer()
    first, second = [(await make(rig, customer)).json()["data"] for _ in range(2)]
    rig.sql(
        "UPDATE api_key SET sealed_secret = (SELECT sealed_secret FROM api_key WHERE id = %s) WHERE id = %s",
        first["_id"], second["_id"],
    )  # fmt: skip
    shown = await rig.client.get(f"/keys/{second['_id']}?show_key=true", headers=customer.owner)
    listed = await page(rig, customer, "?show_key=true")
    told = [json.loads(line) for line in printed.getvalue().splitlines()]
    assert shown.status_code == 200
    assert (shown.json()["data"]["api_key"], shown.json()["data"]["api_key_reason"]) == (None, "unreadable")
    assert [key["api_key"] for key in listed["data"]] == [customer.api_key, first["api_key"], None]
    assert "api_key_reason" not in listed["data"][0]
    assert "api_key" not in (await page(rig, customer))["data"][2]
    assert [(line["event"], line["key_id"]) for line in told] == [("key.secret_unreadable", second["_id"])] * 2
    assert first["api_key"] not in str(told)
    assert (await rig.client.get("/credits/balance", headers={"x-api-key": second["api_key"]})).status_code == 200
    found = (await audit(rig.house.db, Secrets.of(rig.house.settings))).findings
    assert [(finding.check, finding.subject.partition("/")[2]) for finding in found] == [
        ("kept_key_opens", second["_id"])
    ]
    rig.sql("UPDATE api_key SET sealed_secret = NULL WHERE id = %s", second["_id"])


async def test_a_sealing_key_that_was_taken_away_is_told_by_the_audit_and_not_by_a_500(rig: Rig) -> None:
    customer = await rig.customer()
    other = Sealer([("old", b"o" * 32)])
    key_id = _first_key_of(rig, customer)
    [(account_id,)] = rig.sql("SELECT account_id FROM api_key WHERE id = %s", key_id)
    rig.sql(
        "UPDATE api_key SET sealed_secret = %s",
        other.seal(customer.api_key.encode(), issue.sealed_as(account_id, key_id)),
    )
    answer = await rig.client.get(f"/keys/{key_id}?show_key=true", headers=customer.owner)
    assert (answer.status_code, answer.json()["data"]["api_key"]) == (200, None)
    secrets = Secrets.of(rig.house.settings)
    assert [finding.check for finding in (await audit(rig.house.db, secrets)).findings] == ["kept_key_opens"]
    with_the_old_key = Secrets(secrets.pepper, other)
    assert (await audit(rig.house.db, with_the_old_key)).is_clean
    rig.sql("UPDATE api_key SET sealed_secret = NULL")


async def test_a_flood_of_secrets_that_do_not_open_is_cut_short_and_counted(rig: Rig) -> None:
    customer = await rig.customer()
    fill(rig, customer, 150)
    rig.sql("UPDATE api_key SET sealed_secret = 'dev1.00'")
    report = await audit(rig.house.db, Secrets.of(rig.house.settings))
    assert len(report.findings) == 101
    assert (report.findings[-1].subject, report.findings[-1].recorded) == ("differences in all", "151")
    without = await audit(rig.house.db)
    assert without.is_clean
    assert report.checks == without.checks + len(PROOFS)
    rig.sql("UPDATE api_key SET sealed_secret = NULL")
