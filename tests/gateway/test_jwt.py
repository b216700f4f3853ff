"""A JWT calls models as a key does, and a film that one asked for is found by the next one."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from app.admin.tokens import create_token
from app.kernel.settings import Settings
from app.main import create_app
from app.wiring import build
from tests.adapters.test_jwt import OTHER, RSA
from tests.gateway import street as streets
from tests.issuers import AUDIENCE, ISSUER, served
from tests.rig import Rig, exact
from tests.wallets import FakeLightning, FakeWallets

MODEL = "gpt-4o-mini"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def street(clean: str, settings: Settings, tmp_path: Path) -> AsyncIterator[streets.Street]:
    async with served(RSA) as server:
        btcpay = FakeLightning()
        named = replace(settings, jwt_issuer=ISSUER, jwt_audience=(AUDIENCE,), jwt_jwks=server.url)
        house = build(named, clean, gateway=btcpay, wallets=FakeWallets(btcpay))
        await house.db.open()
        transport = httpx.ASGITransport(cast("Any", create_app(house)))
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
            rig = Rig(cast("Any", client), house, clean)
            async with streets.opened(rig, tmp_path) as street:
                yield street
            await rig.audit()
        await house.close()


async def credit(rig: Rig, usd: str) -> None:
    token = await create_token(rig.house.db, rig.house.settings.pepper, "admin", "operator")
    headers = {"Authorization": f"Bearer {token}"}
    found = (await rig.client.post("/admin/accounts/search", headers=headers, json={"q": "user-1"})).json()["data"]
    path = f"/admin/accounts/{found[0]['account_id']}/credit"
    done = await rig.client.post(path, headers=headers, json={"amount_usd": usd, "reason": "a gift"})
    assert done.status_code == 200, done.text


async def test_a_jwt_calls_models_and_pays_for_them(street: streets.Street) -> None:
    token = RSA.token()
    broke = await street.post("/v1/chat/completions", CHAT, authorization=f"Bearer {token}")
    assert (broke.status_code, broke.json()["error"]["code"]) == (402, "insufficient_balance")
    await credit(street.rig, "5")
    answers = [
        await street.post("/v1/chat/completions", CHAT, authorization=f"Bearer {token}"),
        await street.post("/chat/completions", CHAT, authorization=f"Token {token}"),
        await street.post("/v1/embeddings", {"model": "text-embedding-3-small", "input": "Hello"}, x_api_key=token),
        await street.post("/v1/completions", {"model": MODEL, "prompt": "Hello"}, api_key=token),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    cost = sum(exact(answer)["usage"]["total_cost_usd"] for answer in answers)
    assert sum(charge["cost_nusd"] for charge in await street.charges()) == cost * streets.NUSD
    assert len(await street.charges()) == 4
    client = street.anthropic(api_key=token)
    said = await client.messages.create(
        model="claude-sonnet-4-6", max_tokens=20, messages=[{"role": "user", "content": "Hello"}]
    )
    assert said.usage.output_tokens > 0


async def test_a_bad_jwt_calls_nothing(street: streets.Street) -> None:
    for token in (OTHER.token(), RSA.token(exp=1), RSA.token(aud="another")):
        answer = await street.post("/v1/chat/completions", CHAT, authorization=f"Bearer {token}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert token not in answer.text
    assert await street.log() == []


async def test_a_film_is_shown_to_the_next_token_of_who_asked_for_it(street: streets.Street) -> None:
    """Also when all is spent, and not to others."""
    await street.post("/v1/chat/completions", CHAT, authorization=f"Bearer {RSA.token()}")
    await credit(street.rig, "1.5")
    body = {"model": "kling-2.1-pro", "prompt": "A sea", "duration": "5"}
    asked = await street.post("/v1/videos", body, authorization=f"Bearer {RSA.token()}")
    assert asked.status_code == 202, asked.text
    path = f"{street.url}/v1/videos/{asked.json()['id']}"
    mine, theirs = RSA.token(jti="another"), RSA.token(sub="user-2")
    assert (await street.http.get(path, headers={"Authorization": f"Bearer {mine}"})).status_code in (200, 202)
    assert (await street.http.get(path, headers={"Authorization": f"Bearer {theirs}"})).status_code in (402, 404)
    for _ in range(100):
        shown = await street.http.get(path, headers={"Authorization": f"Bearer {mine}"})
        if shown.status_code == 200:
            break
        await asyncio.sleep(0.1)
    assert shown.json()["status"] == "completed"


async def test_no_token_is_kept_by_the_gateway(street: streets.Street, tmp_path: Path) -> None:
    token = RSA.token()
    await street.post("/v1/chat/completions", CHAT, authorization=f"Bearer {token}")
    await credit(street.rig, "5")
    await street.post("/v1/chat/completions", CHAT | {"stream": True}, authorization=f"Bearer {token}")
    await street.told()
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and token.encode() in file.read_bytes()]
    assert kept == []
