"""A small load that remembers: what was acknowledged, and whose outcome is unknown, so that both can be settled later."""

import asyncio
import itertools
import random
import uuid
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import httpx

METHODS: Final = ("btc-lightning", "btc", "ltc")
CAPTURED: Final = "0.02"
COSTS: Final = tuple(Decimal(nusd) / 10**9 for nusd in (1, 45_000, 123_457, 1_000_000))


@dataclass(slots=True)
class Call:
    """One call under an id of its own, which every repeat of it bears; `answer` once it was acknowledged."""

    kind: str
    id: str
    path: str
    body: dict[str, Any]
    cost_usd: Decimal = Decimal(0)
    answer: Any = None
    was_unknown: bool = False


@dataclass(slots=True)
class Load:
    """Workers that call the service, and write down what it said."""

    demo: dict[str, str]
    seed: int
    calls: list[Call] = field(default_factory=list)
    unavailable: int = 0
    wrong: list[str] = field(default_factory=list)
    """Answers that nobody should ever get, such as a 500."""
    _numbers: Any = field(default_factory=itertools.count)

    @property
    def acknowledged(self) -> list[Call]:
        return [call for call in self.calls if call.answer is not None]

    @property
    def unknown(self) -> list[Call]:
        return [call for call in self.calls if call.answer is None]

    async def work(self, stop: asyncio.Event, workers: int = 8) -> None:
        """Call until told to stop. A call whose outcome is unknown is left so, and the next one made."""
        async with self._client() as client:
            await asyncio.gather(
                *(self._worker(client, stop, random.Random(self.seed * 100 + n)) for n in range(workers))
            )

    async def repeat_unknown(self, seconds: float = 30) -> None:
        """Send every call without an answer again, under its id, until it has one."""
        deadline = asyncio.get_running_loop().time() + seconds
        async with self._client() as client:
            while self.unknown:
                assert asyncio.get_running_loop().time() < deadline, [call.path for call in self.unknown]
                await asyncio.gather(*(self._send(client, call) for call in self.unknown[:20]))
                await asyncio.sleep(0.1)

    async def _worker(self, client: httpx.AsyncClient, stop: asyncio.Event, choice: random.Random) -> None:
        while not stop.is_set():
            act = choice.choices(("charge", "settle", "capture", "release", "key", "topup"), (40, 25, 10, 10, 8, 7))[0]
            cost = choice.choice(COSTS)
            if act == "charge":
                await self._charge(client, cost)
            elif act in ("settle", "capture", "release"):
                await self._authorize_and(act, client, cost)
            elif act == "key":
                await self._once(client, "key", "/keys", {"name": f"k{next(self._numbers)}-{uuid.uuid4().hex[:8]}"})
            else:
                method = choice.choice(METHODS)
                await self._once(client, "topup", f"/topup/create/{method}", {"amount": "12.50", "currency": "USD"})

    async def _charge(self, client: httpx.AsyncClient, cost: Decimal) -> None:
        call_id = self._new_id()
        body = {"request_id": call_id, "api_key": self.demo["api_key"], "cost_usd": f"{cost:f}"}
        await self._new(client, Call("charge", call_id, "/v1/meter/charge", body, cost))

    async def _authorize_and(self, act: str, client: httpx.AsyncClient, cost: Decimal) -> None:
        """A hold that is settled, at once or after a capture beyond it, or released."""
        call_id = self._new_id()
        body = {"request_id": call_id, "api_key": self.demo["api_key"], "max_cost_usd": "0.01"}
        held = await self._new(client, Call("authorize", call_id, "/v1/meter/authorize", body))
        if held is None:
            return
        hold = {"hold_id": held["hold_id"]}
        if act == "release":
            await self._new(client, Call("release", call_id, "/v1/meter/release", hold))
            return
        if act == "capture":
            body = hold | {"captured_usd": CAPTURED}
            if await self._new(client, Call("capture", call_id, "/v1/meter/extend", body)) is None:
                return
        await self._new(client, Call("settle", call_id, "/v1/meter/settle", hold | {"cost_usd": f"{cost:f}"}, cost))

    async def _once(self, client: httpx.AsyncClient, kind: str, path: str, body: dict[str, Any]) -> None:
        await self._new(client, Call(kind, self._new_id(), path, body))

    async def _new(self, client: httpx.AsyncClient, call: Call) -> Any:
        self.calls.append(call)
        if not await self._send(client, call):
            call.was_unknown = True
            await asyncio.sleep(0.05)
        return call.answer

    async def _send(self, client: httpx.AsyncClient, call: Call) -> bool:
        """True when the call was acknowledged; then it must be there for ever."""
        if call.path.startswith("/v1/meter"):
            headers = {"Authorization": f"Bearer {self.demo['service_token']}"}
        else:
            headers = {"x-credit-id": self.demo["credit_id"], "Idempotency-Key": call.id}
        try:
            response = await client.post(call.path, json=call.body, headers=headers)
        except httpx.TransportError:
            return False
        if response.status_code in (200, 201):
            call.answer = response.json()
            if call.answer.get("decision") == "deny":
                self.wrong.append(response.text)
            return True
        self._note(response)
        return False

    def _note(self, response: httpx.Response) -> None:
        code = response.json()["error"]["code"]
        is_fine = (response.status_code, code) in (
            (503, "database_unavailable"),
            (503, "payment_backend_unavailable"),
            (409, "idempotency_in_progress"),
        )
        if not is_fine or "retry-after" not in response.headers:
            self.wrong.append(f"{response.status_code} {response.text}")
        self.unavailable += code == "database_unavailable"

    def _new_id(self) -> str:
        return f"call-{next(self._numbers)}-{uuid.uuid4().hex[:12]}"

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.demo["base_url"], timeout=20, trust_env=False)
