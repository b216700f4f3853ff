"""The sandbox's receiver of notices: it shows what came, and whether it was signed by who it should be."""

import time

from app.notices.address import Target, new_secret
from app.notices.courier import signed
from tests.sandbox.conftest import Shop

BODY = b'{"type":"balance.low","timestamp":"2026-11-28T12:00:00Z","data":{"balance_usd":0.5}}'


async def test_a_notice_is_shown_with_whether_its_signature_is_right(port: Shop) -> None:
    secret, now = new_secret(), int(time.time())
    trusted = await port.client.post("/sandbox/notices/secret", json={"secret": secret})
    assert trusted.status_code == 204
    for key, at in ((secret, now), (secret, now), (new_secret(), now), (secret, now - 3600)):
        headers = signed(Target(url="x", secrets=(key,)), "msg_1", BODY, at)
        assert (await port.client.post("/notices", content=BODY, headers=headers)).status_code == 204
    found = (await port.client.get("/sandbox/notices")).json()
    assert [(each["signed"], each["copies"]) for each in found] == [(False, 3), (False, 2), (True, 1), (True, 0)]
    shown = await port.client.get("/notices")
    assert shown.status_code == 200
    assert shown.text.count("balance.low") == 8
    assert shown.text.count("<td>valid</td>") == 2


async def test_what_is_no_notice_is_refused_and_markup_in_one_is_text(port: Shop) -> None:
    assert (await port.client.post("/notices", content=b"no json")).status_code in (400, 422)
    await port.client.post("/notices", content=b'{"type":"<script>alert(1)</script>"}')
    assert "<script>alert" not in (await port.client.get("/notices")).text
