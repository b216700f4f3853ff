"""How the service is asked on an agent's behalf: with the credential of the environment, which no answer repeats."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

import httpx

_SECONDS: Final = 20.0
_TAKES_NO_CREDIT_ID: Final = (
    "This needs the account's credit id: set SATMETER_CREDIT_ID in the environment of this server"
)


class Refused(Exception):
    """What the service says in refusal, or that it cannot be reached; for the agent to read."""


@dataclass(frozen=True, slots=True)
class Account:
    """One account at one service, by its credit id, an API key of it, or both."""

    url: str
    credit_id: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> "Account":
        """From SATMETER_URL, SATMETER_CREDIT_ID and SATMETER_API_KEY. Raises Refused, saying what is missing."""
        credit_id, api_key = environ.get("SATMETER_CREDIT_ID"), environ.get("SATMETER_API_KEY")
        if not credit_id and not api_key:
            raise Refused("Set SATMETER_API_KEY, or SATMETER_CREDIT_ID, in the environment of this server")
        return cls(environ.get("SATMETER_URL", "http://127.0.0.1:8080").rstrip("/"), credit_id or None, api_key or None)

    async def get(self, path: str, **query: Any) -> Any:
        return await self._ask("GET", path, query=query)

    async def post(self, path: str, body: Mapping[str, Any], *, as_owner: bool = False) -> Any:
        """`as_owner`: with the credit id alone, because an API key may not do that."""
        return await self._ask("POST", path, body=body, as_owner=as_owner)

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        as_owner: bool = False,
    ) -> Any:
        """Raises Refused."""
        if as_owner and self.credit_id is None:
            raise Refused(_TAKES_NO_CREDIT_ID)
        headers = {"x-credit-id": self.credit_id} if self.credit_id else {"x-api-key": self.api_key or ""}
        told = {name: value for name, value in (query or {}).items() if value is not None}
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=_SECONDS, trust_env=False) as client:
                answer = await client.request(method, path, params=told, json=body, headers=headers)
                read = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise Refused(f"Satmeter at {self.url} cannot be asked: {type(error).__name__}") from error
        if answer.status_code >= 400:
            raise Refused(str(read.get("message") or f"refused with {answer.status_code}"))
        return read


def segment(text: str) -> str:
    """One part of a path, whatever stands in it."""
    return quote(text, safe="")
