"""Issuers of JWTs for tests: real key pairs, and an HTTP server on loopback that can die, stall and rotate."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

ISSUER: Final = "https://issuer.example/pool"
AUDIENCE: Final = "satmeter"


@dataclass(frozen=True)
class Signer:
    """A key pair with its name. Its algorithm is the one that it is meant for."""

    kid: str
    private: Any
    algorithm: str

    @property
    def public(self) -> dict[str, Any]:
        """As it stands in a JWKS."""
        maker: Any = jwt.algorithms.RSAAlgorithm if self.algorithm == "RS256" else jwt.algorithms.ECAlgorithm
        told = json.loads(maker.to_jwk(self.private.public_key()))
        return {"kid": self.kid, "use": "sig", "alg": self.algorithm, **told}

    def token(self, *, head: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """A good token, but for what is said; None takes a claim away."""
        told = {"iss": ISSUER, "aud": AUDIENCE, "sub": "user-1", "exp": int(time.time()) + 600} | claims
        named = {"kid": self.kid} | dict(head or {})
        kept = {name: value for name, value in told.items() if value is not None}
        payload = json.dumps(kept).encode()
        return jwt.PyJWS().encode(
            payload, self.private, self.algorithm, headers={k: v for k, v in named.items() if v is not None}
        )


@cache
def signer(kid: str, kind: str = "RSA") -> Signer:
    """The same pair for a name all through the run: they take a while to make."""
    if kind == "RSA":
        return Signer(kid, rsa.generate_private_key(65537, 2048), "RS256")
    if kind == "weak":
        return Signer(kid, rsa.generate_private_key(65537, 1024), "RS256")
    return Signer(kid, ec.generate_private_key(ec.SECP256R1()), "ES256")


@dataclass
class IssuerServer:
    """What an issuer serves: its keys, `raw` in their place, `status` with it, or nothing for as long as it `stalls`."""

    keys: list[dict[str, Any]]
    url: str = ""
    raw: bytes | None = None
    status: int = 200
    stalls: bool = False
    asked: int = 0
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def begin(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/jwks.json"

    async def die(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.asked += 1
                while self.stalls:
                    await asyncio.sleep(0.01)
                body = self.raw if self.raw is not None else json.dumps({"keys": self.keys}).encode()
                moved = b"Location: http://127.0.0.1:1/\r\n" if self.status in (301, 302) else b""
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n" % (self.status, len(body), moved) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()


@asynccontextmanager
async def served(*signers: Signer) -> AsyncIterator[IssuerServer]:
    server = IssuerServer([each.public for each in signers])
    await server.begin()
    try:
        yield server
    finally:
        server.stalls = False
        await server.die()
