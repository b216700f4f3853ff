"""A payer over the fake backend: reads a challenge, pays its invoice, and writes the proof as released clients do."""

import base64
import json
import re
from dataclasses import dataclass
from typing import Any, cast

from tests.rig import Rig
from tests.wallets import FakeLightning


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a client reads out of a `WWW-Authenticate` line."""

    macaroon: str
    invoice: str
    payment: dict[str, str]

    @classmethod
    def of(cls, line: str) -> "Challenge":
        # lnget, l402-requests, pyl402 and L402sdk read these two only where they stand first, side by side.
        first = re.match(r'L402 macaroon="([^"]+)", invoice="([^"]+)"', line)
        assert first is not None, line
        payment = line.split(", Payment ", 1)[1]
        return cls(first[1], first[2], dict(re.findall(r'(\w+)="([^"]*)"', payment)))

    @property
    def request(self) -> Any:
        return json.loads(unbase64(self.payment["request"]))

    def l402(self, scheme: str = "L402") -> dict[str, str]:
        return {"Authorization": f"{scheme} {self.macaroon}:{preimage_of(self.invoice).hex()}"}

    def once(self) -> dict[str, str]:
        told = {"challenge": self.payment, "payload": {"preimage": preimage_of(self.invoice).hex()}}
        credential = base64.urlsafe_b64encode(json.dumps(told).encode()).decode().rstrip("=")
        return {"Authorization": f"Payment {credential}"}


def preimage_of(invoice: str) -> bytes:
    """The fake backend's; its hash is in `FakeLightning.bolt11s`."""
    return invoice.encode()


def unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def lightning(rig: Rig) -> FakeLightning:
    return cast("FakeLightning", rig.btcpay)


def pay(rig: Rig, challenge: Challenge, **how: Any) -> None:
    """The backend has it; nobody has told us. From now on whoever proves it is waited for as long as a busy machine needs."""
    rig.house.proofs._patience_seconds = 20
    rig.btcpay.pay(lightning(rig).of(challenge.invoice).id, **how)


async def refused(rig: Rig, key: str, usd: str = "0.01", **more: Any) -> Any:
    rig.house.mint.patience_seconds = 20  # a busy machine: what is measured here is no time
    told = await rig.authorize(key, usd, **more)
    assert (told["decision"], told["status"]) == ("deny", 402), told
    return told


async def challenged(rig: Rig, key: str, usd: str = "0.01") -> Challenge:
    return Challenge.of((await refused(rig, key, usd))["headers"]["WWW-Authenticate"])
