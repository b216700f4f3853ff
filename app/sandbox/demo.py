"""The demo: what a newcomer would do by hand, done over HTTP: open an account, pay a sandbox invoice, spend."""

import asyncio
import time
from decimal import Decimal
from typing import Any

import httpx
import msgspec

_WAIT_SECONDS = 30


class DemoError(Exception):
    """The demo account could not be made; the message says what would help."""


class Demo(msgspec.Struct, frozen=True):
    """A funded account, and the tokens to try everything with it."""

    base_url: str
    sandbox_url: str
    credit_id: str
    api_key: str
    service_token: str
    admin_token: str
    nwc_url: str | None = None
    """The sandbox's wallet, to connect for automatic top-ups; None in what earlier versions wrote."""
    gateway_url: str | None = None
    """Where models are called; None in what earlier versions wrote."""
    console_url: str | None = None
    """The customer's pages, where the credit id signs in; None in what earlier versions wrote."""


async def fund_new_account(base_url: str, sandbox_url: str, usd: str = "5") -> tuple[str, str]:
    """Open an account and top it up by Lightning through the sandbox; returns its credit id and key.

    Raises DemoError.
    """
    async with httpx.AsyncClient(timeout=15, trust_env=False) as client:
        try:
            account = await _post(client, f"{base_url}/accounts/create")
            headers = {"x-credit-id": account["credit_id"]}
            await _have_told(client, base_url, sandbox_url, headers)
            topup = await _post(
                client,
                f"{base_url}/topup/create/btc-lightning",
                headers=headers,
                json={"amount": usd, "currency": "USD"},
            )
            await _post(client, f"{sandbox_url}/sandbox/invoices/{topup['invoice_id']}/pay", json={})
            await _wait_for_credit(client, base_url, topup["invoice_id"], headers)
        except httpx.TransportError as error:
            raise DemoError(
                f"no Satmeter answers at {base_url}; start it with `make run` ({type(error).__name__})"
            ) from error
    return account["credit_id"], account["api_key"]


async def balance(base_url: str, demo: Demo) -> Decimal | None:
    """What an earlier demo account has left, in USD; None if its key is not known any more."""
    async with httpx.AsyncClient(timeout=15, trust_env=False) as client:
        response = await client.get(f"{base_url}/credits/balance", headers={"Authorization": f"Bearer {demo.api_key}"})
    return Decimal(str(response.json()["balance"])) if response.status_code == 200 else None


async def wallet_url(sandbox_url: str) -> str:
    """What connects the sandbox's wallet. Raises DemoError."""
    async with httpx.AsyncClient(timeout=15, trust_env=False) as client:
        try:
            response = await client.get(f"{sandbox_url}/sandbox/wallet")
        except httpx.TransportError as error:
            raise DemoError(
                f"no sandbox answers at {sandbox_url}; start it with `make run` ({type(error).__name__})"
            ) from error
    if response.is_error:
        raise DemoError(f"GET /sandbox/wallet answered {response.status_code}")
    return str(response.json()["uri"])


async def _have_told(client: httpx.AsyncClient, base_url: str, sandbox_url: str, headers: dict[str, str]) -> None:
    """Have the account's notices posted to the sandbox, which shows them, and knows by the secret that they are real."""
    response = await client.put(f"{base_url}/notices", headers=headers, json={"webhook_url": f"{sandbox_url}/notices"})
    if response.is_error:
        raise DemoError(f"PUT /notices answered {response.status_code}: {response.text[:300]}")
    secret = response.json()["signing_secret"]
    told = await client.post(f"{sandbox_url}/sandbox/notices/secret", json={"secret": secret})
    if told.is_error:
        raise DemoError(f"POST /sandbox/notices/secret answered {told.status_code}")


async def _post(client: httpx.AsyncClient, url: str, **kwargs: Any) -> Any:
    response = await client.post(url, **kwargs)
    if response.is_error:
        raise DemoError(
            f"{response.request.method} {response.url.path} answered {response.status_code}: {response.text[:300]}"
        )
    return response.json()


async def _wait_for_credit(client: httpx.AsyncClient, base_url: str, invoice_id: str, headers: dict[str, str]) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        found = (await client.get(f"{base_url}/topup/status/{invoice_id}", headers=headers)).json()
        if found["status"] == "Settled" and found["credited_usd"]:
            return
        await asyncio.sleep(0.1)
    raise DemoError(f"the sandbox payment was not credited within {_WAIT_SECONDS} s; are the jobs running?")
