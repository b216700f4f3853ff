"""An operator at work: short words for the admin API, over the app that other tests use."""

import uuid
from dataclasses import dataclass
from typing import Any

from httpx import Response

from app.admin.tokens import create_token
from tests.rig import Customer, Rig, exact


@dataclass(slots=True)
class Operator:
    """Somebody with an admin token of these scopes (None: all)."""

    rig: Rig
    token: str
    name: str = "ops"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    async def get(self, path: str) -> Any:
        """What is there, with its numbers exact."""
        answer = await self.rig.client.get(f"/admin/{path}", headers=self.headers)
        assert answer.status_code in (200, 202), answer.text
        return exact(answer)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        return await self.rig.client.request(method, f"/admin/{path}", headers=self.headers | headers, json=body)

    async def post(self, path: str, body: Any = None, **headers: str) -> Any:
        answer = await self.ask("POST", path, body, **headers)
        assert answer.status_code in (200, 201), answer.text
        return exact(answer)

    async def acts(self, query: str = "") -> list[Any]:
        return list((await self.get(f"audit-log{query}"))["data"])


async def operator(rig: Rig, *scopes: str, **how: Any) -> Operator:
    name = how.pop("name", f"ops-{uuid.uuid4().hex[:6]}")
    pepper = rig.house.settings.pepper
    token = await create_token(rig.house.db, pepper, "admin", name, scopes=scopes or None, **how)
    return Operator(rig, token, name)


def account_of(rig: Rig, customer: Customer) -> str:
    """The account's id, which its owner is never told."""
    [(account_id,)] = rig.sql(
        "SELECT account_id FROM credential WHERE secret_hash = %s", rig.house.settings.pepper.lookup(customer.credit_id)
    )
    return str(account_id)


def code_of(answer: Response) -> str:
    return str(answer.json()["error"]["code"])
