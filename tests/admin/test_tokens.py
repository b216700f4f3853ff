"""Tokens over HTTP: made with scopes and an expiry, listed with their last use, refused once they are gone."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from app.admin.tokens import create_token
from tests.admin.desk import Operator, code_of, operator
from tests.rig import Rig


async def test_an_operators_token_expires_after_ninety_days_and_a_proxys_never_unless_told(rig: Rig) -> None:
    ops, now = await operator(rig, "tokens"), datetime.now(UTC)
    told = (now + timedelta(days=3)).replace(microsecond=0)
    until = {}
    for name, kind, more in (
        ("a", "admin", {"scopes": ["tokens"]}), ("b", "service", {}), ("c", "admin", {"scopes": ["tokens"], "expires_at": None}),
        ("d", "service", {"expires_at": told.isoformat()}),
    ):  # fmt: skip
        until[name] = (await ops.post("tokens", {"kind": kind, "name": name, **more}))["about"]["expires_at"]
    assert until["b"] is until["c"] is None
    assert datetime.fromisoformat(until["d"]) == told
    ninety = datetime.fromisoformat(until["a"]) - now
    assert timedelta(days=89, hours=23) < ninety < timedelta(days=90, hours=1)
    [(of_the_house,)] = rig.sql("SELECT expires_at FROM admin_token WHERE name = %s", ops.name)
    assert of_the_house is not None


async def test_a_token_made_without_scopes_has_all_and_nobody_gives_what_they_have_not(rig: Rig) -> None:
    everything, narrow = await operator(rig), await operator(rig, "tokens", "read")
    made = await everything.post("tokens", {"kind": "admin", "name": "second"})
    assert made["about"]["scopes"] is None
    assert (await Operator(rig, made["token"]).ask("GET", "stats")).status_code == 200
    for wanted, lacking in (
        (None, ["support", "money", "prices"]),
        (["money"], ["money"]),
        (["read", "prices"], ["prices"]),
    ):
        refused = await narrow.ask("POST", "tokens", {"kind": "admin", "name": "third", "scopes": wanted})
        assert (refused.status_code, code_of(refused)) == (403, "missing_scope")
        assert refused.json()["error"]["metadata"]["missing_scopes"] == lacking
    assert (await narrow.post("tokens", {"kind": "admin", "name": "third", "scopes": ["read"]}))["about"]["scopes"] == ["read"]  # fmt: skip


async def test_a_revoked_or_expired_token_is_refused_at_once_and_its_name_is_free_again(rig: Rig) -> None:
    ops, body = await operator(rig), {"kind": "admin", "name": "night-shift", "scopes": ["read"]}
    made = await ops.post("tokens", body)
    shift = Operator(rig, made["token"])
    assert (await shift.ask("GET", "stats")).status_code == 200
    assert code_of(await ops.ask("POST", "tokens", body)) == "name_taken"
    gone = await ops.post(f"tokens/{made['about']['id']}/revoke", {"reason": "left us"})
    assert gone["state"] == "revoked"
    assert (await shift.ask("GET", "stats")).status_code == 401
    assert (await ops.ask("DELETE", f"tokens/{made['about']['id']}")).status_code == 404
    again = Operator(rig, (await ops.post("tokens", body))["token"])
    rig.sql("UPDATE admin_token SET expires_at = now() - interval '1 s' WHERE name = 'night-shift'")
    assert (await again.ask("GET", "stats")).status_code == 401
    assert await ops.post("tokens", body)
    states = [each["state"] for each in (await ops.get("tokens?kind=admin"))["data"] if each["name"] == "night-shift"]
    assert states == ["live", "revoked", "revoked"]
    assert [act["act"] for act in await ops.acts("?act=token.revoke")] == ["token.revoke"]


async def test_tokens_are_listed_without_a_secret_and_with_their_last_use_at_most_once_a_minute(rig: Rig) -> None:
    ops, customer = await operator(rig), await rig.customer("20")
    for _ in range(3):
        await rig.authorize(customer.api_key, "0.01")
    await asyncio.gather(*(ops.get("stats") for _ in range(3)))
    await rig.house.services.uses.written()
    listed = await ops.ask("GET", "tokens")
    found = {each["name"]: each for each in listed.json()["data"]}
    assert found["proxy"]["last_used_at"] is not None
    assert found[ops.name]["last_used_at"] is not None
    assert ops.token not in listed.text
    before = rig.sql("SELECT token_id, last_used_at, xmin::text FROM token_use ORDER BY 1")
    await rig.house.services.uses._write(before[0][0])  # another process notes it too, in the same minute
    assert rig.sql("SELECT token_id, last_used_at, xmin::text FROM token_use ORDER BY 1") == before
    unused = await ops.post("tokens", {"kind": "service", "name": "unused"})
    assert unused["about"]["last_used_at"] is None


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"name": "Capital"}, "name"), ({"kind": "root"}, "kind"), ({"scopes": ["everything"]}, "scopes"), ({"scopes": []}, "scopes"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"), ({"expires_at": "2999-01-01T00:00:00Z"}, "expires_at"),
        ({"on_expiry": "hold"}, "on_expiry"), ({"kind": "service", "scopes": ["read"]}, "scopes"), ({"secret": "mine"}, "secret"),
    ],
)  # fmt: skip
async def test_a_token_that_makes_no_sense_is_422_and_is_not_made(
    rig: Rig, wrong: dict[str, object], param: str
) -> None:
    ops = await operator(rig)
    answer = await ops.ask("POST", "tokens", {"kind": "admin", "name": "x", **wrong})
    assert (answer.status_code, str(answer.json()["error"]["param"]).split("[")[0]) == (422, param)
    assert len((await ops.get("tokens"))["data"]) == 1


async def test_a_proxys_token_that_expired_charges_nothing(rig: Rig) -> None:
    pepper, soon = rig.house.settings.pepper, datetime.now(UTC) + timedelta(days=1)
    token = await create_token(rig.house.db, pepper, "service", "old", expires_at=soon)
    rig.sql("UPDATE service_token SET expires_at = now() - interval '1 s' WHERE name = 'old'")
    headers = {"Authorization": f"Bearer {token}"}
    answer = await rig.client.post("/v1/meter/verify", headers=headers, json={"api_key": "sk-none"})
    assert (answer.status_code, code_of(answer)) == (401, "invalid_token")
