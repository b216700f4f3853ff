"""Keys below keys: what a child spends counts to every key above it, and no key does more than those above it may."""

import asyncio
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from app.metering.holds import expire_holds
from tests.rig import Customer, Rig, exact

D = Decimal
MANAGING = ["spend", "balance", "keys"]


@dataclass(slots=True)
class Key:
    """A key, and what its holder asks with it."""

    rig: Rig
    customer: Customer
    told: Any

    @property
    def id(self) -> str:
        return str(self.told["_id"])

    @property
    def secret(self) -> str:
        return str(self.told["api_key"])

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}

    async def ask(self, method: str, path: str, **wanted: Any) -> Any:
        return await self.rig.client.request(method, path, headers=self.bearer, json=wanted or None)

    async def child(self, **wanted: Any) -> "Key":
        answer = await self.ask("POST", "/keys", **{"name": uuid.uuid4().hex[:20], **wanted})
        assert answer.status_code == 201, answer.text
        return Key(self.rig, self.customer, exact(answer)["data"])

    async def authorize(self, usd: str, **more: Any) -> Any:
        return await self.rig.authorize(self.secret, usd, **more)

    async def charge(self, usd: str, **more: Any) -> Any:
        return exact(
            await self.rig.meter("charge", request_id=uuid.uuid4().hex, api_key=self.secret, cost_usd=usd, **more)
        )

    async def shown(self) -> Any:
        return exact(await self.rig.client.get(f"/keys/{self.id}", headers=self.customer.owner))["data"]

    async def patched(self, **wanted: Any) -> Any:
        """By the account's owner."""
        return await self.rig.client.patch(f"/keys/{self.id}", headers=self.customer.owner, json=wanted)


async def root(rig: Rig, usd: str = "100", **wanted: Any) -> Key:
    customer = await rig.customer(usd)
    return Key(rig, customer, await rig.new_key(customer, **{"scopes": MANAGING, **wanted}))


async def chain(rig: Rig, length: int, **wanted: Any) -> list[Key]:
    """A root, and one below the other."""
    keys = [await root(rig, **wanted)]
    for _ in range(length):
        keys.append(await keys[-1].child(scopes=MANAGING))
    return keys


def spent(shown: Any) -> tuple[Any, Any]:
    return shown["current_period_usage_usd"], shown["total_usage_all_time_usd"]


def refused(answer: Any) -> Any:
    assert answer["decision"] == "deny", answer
    return answer["error"]


# --- what counts to whom ------------------------------------------------------------------------------------------


async def test_a_charge_counts_to_the_key_and_to_every_key_above_it_once(rig: Rig) -> None:
    keys = await chain(rig, 3)
    await keys[3].charge("1")
    await keys[1].charge("0.5")
    hold = await keys[2].authorize("2")
    await rig.settle(hold["hold_id"], "3")  # above its hold
    assert [spent(await key.shown()) for key in keys] == [
        (D("4.5"), D("4.5")), (D("4.5"), D("4.5")), (D(4), D(4)), (D(1), D(1))
    ]  # fmt: skip
    assert await rig.balance(keys[0].customer) == D("95.5")
    credits = exact(await rig.client.get("/api/v1/credits", headers=keys[0].customer.key))["data"]
    assert credits == {"total_credits": 100, "total_usage": D("4.5")}, "and not once more for each key above"


async def test_every_end_of_a_hold_frees_it_on_all_keys(rig: Rig) -> None:
    parent = await root(rig, usage_limit_usd=10)
    child = await parent.child()
    held = [(await child.authorize("2"))["hold_id"] for _ in range(5)]
    assert refused(await parent.authorize("1"))["code"] == "funds_held"
    await rig.meter("release", hold_id=held[0])
    await rig.settle(held[1], "0.5")
    grown = await rig.meter("extend", hold_id=held[2], ttl_seconds=60, captured_usd="3")
    assert grown.status_code == 200
    rig.sql("UPDATE hold SET expires_at = now() - interval '1 minute' WHERE state = 'open'")
    assert await expire_holds(rig.house.db) == 3
    await rig.settle(held[3], "1")  # late
    assert spent(await parent.shown())[0] == spent(await child.shown())[0] == D("4.5")
    assert rig.sql("SELECT sum(held_nusd) FROM api_key") == [(0,)]
    assert (await parent.authorize("5.5"))["decision"] == "allow"


async def test_a_refund_gives_the_windows_of_every_key_above_back(rig: Rig) -> None:
    parent = await root(rig, limits=[{"usd": 1, "period": "daily"}, {"usd": 5, "period": "total"}])
    child = await parent.child(usage_limit_usd=1)
    charged = await child.charge("1")
    assert refused(await parent.authorize("0.5"))["code"] == "key_limit_exceeded"
    await rig.meter("refund", charge_id=charged["charge_id"], amount_usd="0.6")
    shown = await parent.shown()
    assert [each["spent_usd"] for each in shown["limits"]] == [D("0.4"), D("0.4")]
    assert spent(await child.shown()) == spent(shown) == (D("0.4"), D("0.4"))
    assert (await child.authorize("0.6"))["decision"] == "allow"


async def test_a_hold_of_yesterday_counts_to_yesterday_on_every_key(rig: Rig) -> None:
    parent = await root(rig, limits=[{"usd": 1, "period": "daily"}, {"usd": 50, "period": "total"}])
    child = await parent.child()
    hold = await child.authorize("0.6")
    rig.sql(
        """UPDATE api_key SET window_start = window_start - interval '1 day', more_starts = CASE WHEN more_starts IS NOT NULL
               THEN ARRAY (SELECT start - interval '1 day' FROM unnest(more_starts) start) END"""
    )
    rig.sql("UPDATE hold SET window_start = window_start - interval '1 day'")
    assert refused(await parent.authorize("0.5"))["code"] == "funds_held", "still held, so still counted"
    await rig.settle(hold["hold_id"], "0.6")
    limits = (await parent.shown())["limits"]
    assert [(each["period"], each["spent_usd"]) for each in limits] == [("daily", 0), ("total", D("0.6"))]


# --- bounds -------------------------------------------------------------------------------------------------------


async def test_fifty_children_spend_the_last_dollar_of_their_parent_and_not_a_cent_more(rig: Rig) -> None:
    parent = await root(rig, usage_limit_usd=3)
    await parent.charge("2")
    children = [await parent.child() for _ in range(50)]

    async def spend(number: int, child: Key) -> Counter[str]:
        found: Counter[str] = Counter()
        for _ in range(3):
            if number % 2:
                answer = await child.charge("0.03")
                found[answer["decision"]] += 1
            else:
                answer = await child.authorize("0.03")
                if answer["decision"] == "allow":
                    await rig.settle(answer["hold_id"], "0.03")
                found[answer["decision"]] += 1
        return found

    await asyncio.gather(*(spend(number, child) for number, child in enumerate(children)))
    await asyncio.gather(*(child.charge("0.01") for child in children))
    assert spent(await parent.shown()) == (D(3), D(3))
    assert await rig.balance(parent.customer) == 97
    assert sum([spent(await child.shown())[0] for child in children], D(0)) == 1
    told = refused(await children[0].charge("0.01"))
    assert (told["code"], told["metadata"]["limit_source"]) == (
        "key_limit_exceeded",
        f"parent_key_limit:{parent.id}:total",
    )


async def test_a_refusal_names_the_key_and_the_window_that_refuse(rig: Rig) -> None:
    parent = await root(rig, limits=[{"usd": 2, "period": "daily"}, {"usd": 3, "period": "monthly"}])
    child = await parent.child(limits=[{"usd": 1, "period": "weekly"}, {"usd": "1.5", "period": "total"}])
    told = refused(await child.authorize("1.2"))["metadata"]
    assert (told["limit_source"], told["limit_period"], told["available_usd"]) == ("key_limit:weekly", "weekly", 1)
    assert datetime.fromisoformat(told["reset_at"]).weekday() == 0
    await parent.charge("1.5")
    told = refused(await child.authorize("0.8"))["metadata"]
    assert (told["limit_source"], told["limit_key_id"]) == (f"parent_key_limit:{parent.id}:daily", parent.id)
    assert (told["available_usd"], told["limit_usd"]) == (D("0.5"), 2)
    hold = await child.authorize("0.5")
    held = refused(await child.authorize("0.2"))
    assert (held["code"], held["metadata"]["limit_source"]) == ("funds_held", f"parent_key_limit:{parent.id}:daily")
    await rig.settle(hold["hold_id"], "0.5")
    lone = await root(rig, usage_limit_usd=1, scopes=["spend"])
    assert refused(await lone.authorize("2"))["metadata"]["limit_source"] == "key_limit"


async def test_a_parents_bounds_on_single_calls_hold_for_its_whole_subtree(rig: Rig) -> None:
    parent = await root(rig, max_usd_per_call="0.5", requests_per_minute=1000)
    child = await (await parent.child(scopes=MANAGING)).child()
    told = refused(await child.authorize("0.6"))
    assert (told["code"], told["metadata"]["limit_source"]) == (
        "key_limit_exceeded",
        f"parent_max_usd_per_call:{parent.id}",
    )
    for _ in range(3):
        await child.charge("0.1")
        await parent.charge("0.1")
    rig.sql(
        "UPDATE api_key SET minute_start = date_trunc('minute', now()), minute_calls = 1000 WHERE requests_per_minute = 1000"
    )
    answer = await child.authorize("0.1")
    if answer["decision"] == "deny":  # unless another minute began since
        told = answer["error"]
        assert (told["code"], told["metadata"]["limit_source"]) == (
            "rate_limit_exceeded", f"parent_requests_per_minute:{parent.id}"
        )  # fmt: skip


# --- what a key below another one may be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"usage_limit_usd": 11, "reset_period": "daily"}, "usage_limit_usd"),
        ({"limits": [{"usd": 1, "period": "daily"}, {"usd": "100.01", "period": "total"}]}, "limits"),
        ({"limits": [{"usd": "10.5", "period": "daily"}]}, "limits"),
        ({"expire_at": "2990-01-01T00:00:00Z"}, "expire_at"),
        ({"scopes": ["spend", "topup"]}, "scopes"),
        ({"allowed_models": ["m", "x"]}, "allowed_models"),
        ({"max_usd_per_call": 3}, "max_usd_per_call"),
        ({"requests_per_minute": 61}, "requests_per_minute"),
    ],
)
async def test_a_key_below_is_never_given_more_than_those_above_have(rig: Rig, wanted: Any, param: str) -> None:
    limits = [{"usd": 10, "period": "daily"}, {"usd": 100, "period": "total"}]
    bounds: dict[str, Any] = {
        "limits": limits, "expire_at": "2980-01-01T00:00:00Z", "allowed_models": ["m", "n"], "max_usd_per_call": 2, "requests_per_minute": 60
    }  # fmt: skip
    grandparent = await root(rig, **bounds)
    parent = await grandparent.child(scopes=MANAGING)
    answer = await parent.ask("POST", "/keys", name="more", **wanted)
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
        422,
        "invalid_field",
        param,
    )
    child = await parent.child(
        limits=limits, expire_at="2979-01-01T00:00:00Z", allowed_models=["n"], max_usd_per_call=2, requests_per_minute=60, scopes=["spend"]
    )  # fmt: skip
    for answer in (await parent.ask("PATCH", f"/keys/{child.id}", **wanted), await child.patched(**wanted)):
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert (await child.shown())["allowed_models"] == ["n"]


async def test_a_key_below_has_no_scope_that_one_above_lacks_now(rig: Rig) -> None:
    parent = await root(rig)
    child, managing = await parent.child(), await parent.child(scopes=["keys", "spend"])
    assert child.told["scopes"] == ["spend", "balance"], "all that its parent may, but make keys"
    assert (await child.ask("GET", "/keys")).status_code == 403
    assert (await child.ask("GET", "/topups")).status_code == 403
    assert (await child.ask("GET", "/credits/balance")).status_code == 200
    assert (await managing.ask("GET", "/credits/balance")).status_code == 403
    await parent.patched(scopes=["keys", "balance"])
    assert refused(await child.authorize("1"))["code"] == "missing_scope"
    assert (await managing.ask("POST", "/keys", name="a", scopes=["spend"])).status_code == 422
    await parent.patched(scopes=["spend"])
    assert (await managing.ask("GET", "/keys")).json()["error"]["code"] == "missing_scope"


async def test_lowering_a_parent_binds_the_keys_below_it_as_they_are(rig: Rig) -> None:
    parent = await root(rig)
    child = await parent.child(usage_limit_usd=50, allowed_models=["m", "n"])
    await child.charge("2", model="m")
    await parent.patched(usage_limit_usd=3, allowed_models=["n"], max_usd_per_call="0.5")
    assert refused(await child.authorize("0.1", model="m"))["code"] == "model_not_allowed"
    assert (
        refused(await child.authorize("0.6", model="n"))["metadata"]["limit_source"]
        == f"parent_max_usd_per_call:{parent.id}"
    )
    assert (await child.authorize("0.5", model="n"))["decision"] == "allow"
    shown = exact(await rig.meter("verify", api_key=child.secret))
    assert (shown["available_usd"], shown["allowed_models"]) == (D("0.5"), ["n"])


async def test_five_keys_may_stand_above_one_and_no_more(rig: Rig) -> None:
    keys = await chain(rig, 5)
    assert [key.told["depth"] for key in keys] == [0, 1, 2, 3, 4, 5]
    assert [key.told["parent_id"] for key in keys] == [None, *(key.id for key in keys[:-1])]
    answer = await keys[5].ask("POST", "/keys", name="too deep")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_field")
    await keys[5].charge("1")
    assert [spent(await key.shown())[0] for key in keys] == [1] * 6


async def test_a_key_manages_what_is_below_it_and_nothing_else(rig: Rig) -> None:
    parent = await root(rig)
    child = await parent.child(name="child", scopes=MANAGING)
    grandchild, sibling = await child.child(name="grandchild"), await parent.child(name="sibling")
    listed = exact(await child.ask("GET", "/keys"))["data"]
    assert [(each["_id"], each["parent_id"], each["depth"]) for each in listed] == [(grandchild.id, child.id, 2)]
    assert len(exact(await parent.ask("GET", "/keys"))["data"]) == 3
    owners = exact(await rig.client.get("/keys", headers=parent.customer.owner))["data"]
    assert [each["depth"] for each in owners] == [0, 0, 1, 2, 1], "the first is the account's own"
    for other in (child, parent, sibling):
        for method in ("GET", "PATCH", "DELETE"):
            answer = await child.ask(method, f"/keys/{other.id}", **({"disabled": True} if method == "PATCH" else {}))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_not_found")
    changed = await child.ask("PATCH", f"/keys/{grandchild.id}", usage_limit_usd=2)
    assert exact(changed)["data"]["usage_limit_usd"] == 2
    assert (await child.ask("DELETE", f"/keys/{grandchild.id}")).status_code == 200
    assert (await rig.client.get("/keys", headers=parent.customer.key)).status_code == 401, (
        "a key that was given no scope"
    )


async def test_openrouters_clients_manage_the_keys_below_one_too(rig: Rig) -> None:
    parent = await root(rig, usage_limit_usd=10)
    answer = await parent.ask("POST", "/api/v1/keys", name="theirs", limit=11)
    assert (answer.status_code, answer.json()["error"]["metadata"]["error_code"]) == (422, "invalid_field")
    answer = await parent.ask("POST", "/api/v1/keys", name="theirs", limit=4)
    assert answer.status_code == 201, answer.text
    made = exact(answer)
    child = Key(rig, parent.customer, {"api_key": made["key"]})
    await child.charge("1")
    await parent.charge("7.5")
    told = exact(await child.ask("GET", "/api/v1/key"))["data"]
    assert (told["limit"], told["limit_remaining"], told["usage"]) == (4, D("1.5"), 1), "the least of all"
    assert (told["usage_daily"], exact(await parent.ask("GET", "/api/v1/key"))["data"]["usage_daily"]) == (1, D("8.5"))
    listed = exact(await parent.ask("GET", "/api/v1/keys"))["data"]
    assert [(each["name"], each["limit_remaining"]) for each in listed] == [("theirs", D("1.5"))]
    deleted = await parent.ask("DELETE", f"/api/v1/keys/{listed[0]['hash']}")
    assert deleted.json() == {"deleted": True}
    assert refused(await child.authorize("0.1"))["code"] == "invalid_api_key"


async def test_gateways_are_told_the_least_of_all_that_is_left(rig: Rig) -> None:
    parent = await root(rig, usage_limit_usd=5)
    child = await parent.child(usage_limit_usd=4)
    service = {"X-Service-Token": (await rig.service())["Authorization"].removeprefix("Bearer ")}

    async def ask() -> Any:
        return await rig.client.get("/v1/meter/ext-authz", headers=service | child.bearer)

    left = D((await ask()).headers["X-Balance-Usd"])
    flat = 4 - left
    await parent.charge("3")
    assert D((await ask()).headers["X-Balance-Usd"]) == 2 - 2 * flat
    assert exact(await rig.meter("verify", api_key=child.secret))["available_usd"] == 2 - 2 * flat
    await parent.patched(disabled=True)
    assert (await ask()).status_code == 401


# --- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["revoke", "disable", "expire"])
async def test_what_ends_a_key_ends_all_below_it_at_once(rig: Rig, how: str) -> None:
    keys = await chain(rig, 3)
    hold = await keys[3].authorize("1")
    if how == "revoke":
        assert (await rig.client.delete(f"/keys/{keys[1].id}", headers=keys[0].customer.owner)).status_code == 200
    elif how == "disable":
        await keys[1].patched(disabled=True)
    else:
        rig.sql("UPDATE api_key SET expire_at = now() WHERE id = %s", keys[1].id)
    for key in keys[1:]:
        assert refused(await key.authorize("1"))["code"] == refused(await key.charge("1"))["code"] == "invalid_api_key"
        assert (await key.ask("GET", "/credits/balance")).status_code == 401
        assert (await key.ask("POST", "/keys", name="new")).status_code == 401
    assert exact(await rig.meter("verify", api_key=keys[3].secret))["decision"] == "deny"
    assert (await keys[0].authorize("1"))["decision"] == "allow"
    await rig.settle(hold["hold_id"], "1")
    assert spent(await keys[0].shown())[0] == 1, "what was used is charged"
    if how == "revoke":
        assert (await keys[0].ask("GET", "/keys")).json()["data"] == []
        answer = await rig.client.get("/keys?include_disabled=true", headers=keys[0].customer.owner)
        assert [each["deleted_at"] is not None for each in answer.json()["data"]] == [False, False, True, True, True]
    elif how == "disable":
        await keys[1].patched(disabled=False)
        assert (await keys[3].authorize("1"))["decision"] == "allow"
    else:
        rig.sql("UPDATE api_key SET expire_at = NULL")


async def test_no_key_comes_to_be_below_one_that_is_revoked_at_that_moment(rig: Rig) -> None:
    """Whichever is first: the new key dies with its parent, or is not made."""
    for _ in range(4):
        parent = await root(rig)

        async def make(number: int, parent: Key = parent) -> Any:
            return await parent.ask("POST", "/keys", name=f"k{number}")

        async def revoke(parent: Key = parent) -> Any:
            return await rig.client.delete(f"/keys/{parent.id}", headers=parent.customer.owner)

        *made, gone = await asyncio.gather(*(make(number) for number in range(6)), revoke())
        assert gone.status_code == 200
        assert {answer.status_code for answer in made} <= {201, 401}
        for answer in made:
            if answer.status_code == 201:
                told = await rig.authorize(answer.json()["data"]["api_key"], "0.01")
                assert refused(told)["code"] == "invalid_api_key"
        assert rig.sql("SELECT count(*) FROM api_key WHERE parent_id = %s AND deleted_at IS NULL", parent.id) == [(0,)]


async def test_revoking_at_once_with_the_calls_of_the_subtree_leaves_the_books_right(rig: Rig) -> None:
    keys = await chain(rig, 2)

    async def call(key: Key) -> Any:
        answer = await key.authorize("0.1")
        if answer["decision"] == "allow":
            await rig.settle(answer["hold_id"], "0.1")
        return answer["decision"]

    calls = [call(keys[number % 3]) for number in range(30)]
    answers = await asyncio.gather(*calls[:15], keys[0].ask("DELETE", f"/keys/{keys[1].id}"), *calls[15:])
    allowed = answers.count("allow")
    assert await rig.balance(keys[0].customer) == 100 - D(allowed) / 10
    assert spent(await keys[0].shown())[0] == D(allowed) / 10
