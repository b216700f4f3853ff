"""The notices' door: who may, what is refused, and what is never shown."""

import json
from typing import Any

import pytest

from app.adapters.webhooks import HttpWebhooks
from app.kernel.errors import InvalidField
from app.notices.tell import EVENTS
from app.notices.ways import Outcome
from tests.notices.words import deliveries, set_notices
from tests.rig import Rig

URL = "http://hooks.example.com:8443/satmeter/T0KEN-of-theirs?key=S3CRET"
NPUB = "npub1dergggklka99wwrs92yz8wdjs952h2ux2ha2ed598ngwu9w7a6fsh9xzpc"


async def test_a_url_s_path_and_a_secret_are_shown_once_or_never(rig: Rig) -> None:
    customer = await rig.customer()
    made = await set_notices(rig, customer, webhook_url=URL, npub=NPUB, low_balance_usd=2.5)
    assert made["signing_secret"].startswith("whsec_")
    again = await set_notices(rig, customer, webhook_url=URL, npub=NPUB, low_balance_usd=2.5)
    shown = (await rig.client.get("/notices", headers=customer.owner)).json()
    assert shown == again
    assert (shown["webhook_url"], shown["npub"]) == ("http://hooks.example.com:8443/…", NPUB)
    assert (shown["low_balance_usd"], shown["events"], shown["webhook_state"]) == (2.5, list(EVENTS), "active")
    [kept] = rig.sql("SELECT n::text FROM notice_address n")
    for text in (json.dumps(shown), kept[0], json.dumps(await deliveries(rig, customer))):
        assert "T0KEN" not in text
        assert "S3CRET" not in text
        assert made["signing_secret"] not in text


async def test_no_key_sets_or_sees_where_notices_go(rig: Rig) -> None:
    customer, stranger = await rig.customer(), await rig.customer()
    await set_notices(rig, customer, webhook_url=URL)
    for method, path in (
        ("PUT", "/notices"), ("GET", "/notices"), ("DELETE", "/notices"), ("POST", "/notices/test"),
        ("POST", "/notices/secret"), ("GET", "/notices/deliveries"),
    ):  # fmt: skip
        answer = await rig.client.request(method, path, headers=customer.key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_credit_id"), path
    assert (await rig.client.get("/notices", headers=stranger.owner)).json()["webhook_url"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("webhook_url", "ftp://example.com/"), ("webhook_url", "https://user:pass@example.com/"), ("webhook_url", "https://"),
        ("webhook_url", "wss://example.com/"), ("webhook_url", ""), ("webhook_url", "https://example.com/" + "x" * 600),
        ("webhook_url", "https://example.com/\r\nx: y"), ("webhook_url", 5), ("npub", "nsec1vl029mgpspedva04g90vltkh6fvh240zqtv9k0t9af8935ke9laqsnlfe5"),
        ("npub", "npub1nonsense"), ("npub", "00" * 32), ("low_balance_usd", -1), ("low_balance_usd", "1e3"), ("low_balance_usd", "NaN"),
        ("events", ["balance.high"]), ("events", ["backend.down"]), ("events", "balance.low"),
    ],
)  # fmt: skip
async def test_what_cannot_be_told_to_is_refused_by_its_name_and_changes_nothing(
    rig: Rig, field: str, value: Any
) -> None:
    customer = await rig.customer()
    await set_notices(rig, customer, webhook_url=URL)
    before = rig.sql("SELECT n::text FROM notice_address n")
    answer = await rig.client.put("/notices", headers=customer.owner, json={field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, field), answer.text
    assert str(value) not in answer.text or len(str(value)) < 20
    assert rig.sql("SELECT n::text FROM notice_address n") == before


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/", "https://127.0.0.1/", "https://[::1]/", "https://10.1.2.3/", "https://169.254.169.254/latest",
        "https://localhost/", "https://db.internal/", "https://2130706433/", "https://0x7f.1/", "https://hooks.example.com:22/",
        "https://[::ffff:10.0.0.1]/", "https://metadata/",
    ],
)  # fmt: skip
def test_a_url_that_leads_into_our_network_is_refused_where_it_is_set(url: str) -> None:
    with pytest.raises(InvalidField):
        HttpWebhooks(allow_private=False).shown(url)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "::1", "169.254.169.254", "fd00::1"])
async def test_a_name_that_leads_into_our_network_is_refused_when_it_is_dialled(address: str) -> None:
    """However public it was when it was set: each attempt resolves and judges anew, and dials what it judged."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.215.14", address]

    sent = await HttpWebhooks(allow_private=False, resolve=resolve).post("https://hooks.example.com/", b"{}", {})
    assert (sent.outcome, sent.error) == (Outcome.FAILED, "not_allowed")


async def test_deliveries_come_in_pages_newest_first(rig: Rig) -> None:
    customer = await rig.customer()
    await set_notices(rig, customer, webhook_url=URL, npub=NPUB)
    ids = [(await rig.client.post("/notices/test", headers=customer.owner)).json()["id"] for _ in range(3)]
    seen: list[tuple[str, str]] = []
    cursor: str | None = None
    for _ in range(3):
        query = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = (await rig.client.get("/notices/deliveries", headers=customer.owner, params=query)).json()
        seen += [(each["id"], each["channel"]) for each in page["data"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert seen == [(each, channel) for each in reversed(ids) for channel in ("webhook", "nostr")]
    bad = await rig.client.get("/notices/deliveries", headers=customer.owner, params={"cursor": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "cursor")


async def test_a_test_needs_an_address_and_its_key_is_kept(rig: Rig) -> None:
    customer = await rig.customer()
    assert (await rig.client.post("/notices/test", headers=customer.owner)).status_code == 422
    assert (await rig.client.delete("/notices", headers=customer.owner)).status_code == 404
    await set_notices(rig, customer, webhook_url=URL)
    once = customer.owner | {"Idempotency-Key": "the-same-test-twice"}
    answers = [await rig.client.post("/notices/test", headers=once) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert len(await deliveries(rig, customer)) == 1
