"""The exact bytes of a challenge, and of the proofs that come back. Nothing here asks anybody.

One `WWW-Authenticate` line, L402 first and then `Payment`: the form that every released client reads.
Sources: lightninglabs/L402 protocol-specification (bLIP-26), libmacaroons' format v2, draft-httpauth-payment-01,
draft-lightning-charge-00, RFC 8785.
"""

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import msgspec

from app.kernel.errors import InvalidApiKey
from app.kernel.security import Pepper
from app.keys.verify import PROOF_SCHEMES

_MAX_PROOF_CHARS: Final = 8192
_NETWORKS: Final = {"bc": "mainnet", "bcrt": "regtest", "tbs": "signet"}
"""By a BOLT11's prefix; draft-lightning-charge knows no others."""
_SOONER: Final = timedelta(seconds=30)
"""A challenge ends before its invoice, so that who pays in its last second still pays in time."""
_SLOTS: Final = ("realm", "method", "intent", "request", "expires", "digest", "opaque")
_IDENTIFIER_BYTES: Final = 66


class Asked(Protocol):
    """What a BOLT11 asks for; `network` is its prefix, `payment_hash` hex."""

    @property
    def network(self) -> str: ...
    @property
    def amount_msat(self) -> int | None: ...
    @property
    def payment_hash(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Payable:
    """An invoice that a challenge asks to be paid."""

    bolt11: str
    network: str
    amount_sats: int
    payment_hash: bytes
    expires_at: datetime

    @classmethod
    def of(cls, bolt11: str, asked: Asked, expires_at: datetime) -> "Payable":
        """Raises ValueError for an invoice without an amount."""
        if not asked.amount_msat:
            raise ValueError("the invoice names no amount")
        return cls(bolt11, asked.network, -(-asked.amount_msat // 1000), bytes.fromhex(asked.payment_hash), expires_at)


@dataclass(frozen=True, slots=True)
class Proof:
    """That somebody paid the invoice of this hash, which we challenged them to. `single_use`: a `Payment` is, a token is not."""

    payment_hash: bytes
    preimage: bytes = field(repr=False)
    single_use: bool
    challenge_id: str


class Challenges:
    """Writes challenges and reads proofs, in the name of one realm: the host that customers know."""

    def __init__(self, pepper: Pepper, realm: str, description: str) -> None:
        self._pepper, self._realm, self._description = pepper, realm, description
        self._macaroon_key = _hmac(b"macaroons-key-generator", pepper.tag(b"offer/macaroon"))
        self._payment_key = pepper.tag(b"offer/payment")

    def line(self, payable: Payable) -> str:
        """The value of `WWW-Authenticate`; the same for the same invoice, whoever asks and however often."""
        token = base64.b64encode(self.macaroon(payable.payment_hash)).decode()
        l402 = f'L402 macaroon="{token}", invoice="{payable.bolt11}", version="0", token="{token}"'
        if payable.network not in _NETWORKS:
            return l402
        payment = self._payment(payable)
        return f"{l402}, Payment " + ", ".join(f'{name}="{value}"' for name, value in payment.items())

    def challenge_id(self, payable: Payable) -> str:
        return self._payment(payable)["id"]

    def macaroon(self, payment_hash: bytes) -> bytes:
        """Version 2, no location, no caveat: what it may do is decided by the key it is an alias of."""
        token_id = self._pepper.tag(b"offer/token", payment_hash, b"1") + self._pepper.tag(
            b"offer/token", payment_hash, b"2"
        )
        identifier = b"\x00\x00" + payment_hash + token_id
        assert len(identifier) == _IDENTIFIER_BYTES, "lnget refuses others"
        signature = _hmac(self._macaroon_key, identifier)
        return b"\x02\x02" + bytes([len(identifier)]) + identifier + b"\x00\x00\x06\x20" + signature

    def read(self, credential: str) -> Proof:
        """From an Authorization header. Raises InvalidApiKey for what is no proof of a payment that we asked for."""
        scheme, _, rest = credential.strip().partition(" ")
        if rest.partition(" ")[0].lower() == scheme.lower():  # pyl402 0.1.2 says it twice where it sends a token again
            rest = rest.partition(" ")[2]
        if scheme.lower() not in PROOF_SCHEMES or len(credential) > _MAX_PROOF_CHARS or not credential.isascii():
            raise InvalidApiKey
        try:
            return self._read_payment(rest.strip()) if scheme.lower() == "payment" else self._read_token(rest.strip())
        except (ValueError, KeyError, TypeError, AttributeError, msgspec.DecodeError):
            raise InvalidApiKey from None

    def receipt(self, proof: Proof, at: datetime) -> str:
        """The value of `Payment-Receipt`. It holds no secret."""
        told = {
            "challengeId": proof.challenge_id, "method": "lightning", "reference": proof.payment_hash.hex(), "status": "success",
            "timestamp": _instant(at),
        }  # fmt: skip
        return _b64url(_canonical(told))

    def _payment(self, payable: Payable) -> dict[str, str]:
        request = {
            "amount": str(payable.amount_sats), "currency": "sat", "description": self._description,
            "methodDetails": {
                "invoice": payable.bolt11, "network": _NETWORKS.get(payable.network, payable.network),
                "paymentHash": payable.payment_hash.hex(),
            },
        }  # fmt: skip
        challenge = {
            "realm": self._realm, "method": "lightning", "intent": "charge", "request": _b64url(_canonical(request)),
            "expires": _instant(payable.expires_at - _SOONER),
        }  # fmt: skip
        return {"id": self._id(challenge), **challenge}

    def _id(self, challenge: dict[str, str]) -> str:
        """A MAC over all that was asked, seven slots always, so that no client can ask itself for less."""
        return _b64url(_hmac(self._payment_key, "|".join(challenge.get(slot) or "" for slot in _SLOTS).encode()))

    def _read_token(self, text: str) -> Proof:
        encoded, _, preimage = text.rpartition(":")
        macaroon = _unbase64(encoded)
        payment_hash = macaroon[5:37]
        is_ours = len(payment_hash) == 32 and hmac.compare_digest(macaroon, self.macaroon(payment_hash))
        return _proven(is_ours, payment_hash, preimage, False, "")

    def _read_payment(self, text: str) -> Proof:
        credential: dict[str, Any] = msgspec.json.decode(_unbase64(text))
        challenge = dict(credential["challenge"])
        if isinstance(challenge["request"], dict):  # some read it, and send it back as they read it
            challenge["request"] = _b64url(_canonical(challenge["request"]))
        is_ours = challenge["realm"] == self._realm and hmac.compare_digest(challenge["id"], self._id(challenge))
        request = msgspec.json.decode(_unbase64(challenge["request"]))
        payment_hash = bytes.fromhex(request["methodDetails"]["paymentHash"])
        return _proven(is_ours, payment_hash, credential["payload"]["preimage"], True, challenge["id"])


def _proven(is_ours: bool, payment_hash: bytes, preimage_hex: str, single_use: bool, challenge_id: str) -> Proof:
    preimage = bytes.fromhex(preimage_hex)
    is_paid = hmac.compare_digest(hashlib.sha256(preimage).digest(), payment_hash)
    if not (is_ours and is_paid and preimage):
        raise InvalidApiKey
    return Proof(payment_hash, preimage, single_use, challenge_id)


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _canonical(value: Any) -> bytes:
    """RFC 8785, for what holds text alone."""
    return msgspec.json.encode(value, order="sorted")


def _b64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    """In either alphabet, padded or not: clients write what they were given in their own way."""
    plain = text.strip().rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _instant(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
