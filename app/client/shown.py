"""What a caller shows of who they are: an API key, a proof of payment, or both; and whether they want to be told how to pay."""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

_DOTS_OF_A_JWT: Final = 2
_PROOFS: Final = ("l402", "lsat", "payment")


class Shown(msgspec.Struct, frozen=True):
    """`proof` is an Authorization header that holds one: Satmeter made it, and reads it. `topup_offer` is `none` for who wants
    no refusal that can be paid."""

    api_key: str | None = None
    proof: str | None = None
    topup_offer: str | None = None

    @classmethod
    def of(cls, shown: "Shown | str | None") -> "Shown":
        return shown if isinstance(shown, Shown) else cls(shown)

    def __bool__(self) -> bool:
        return bool(self.api_key or self.proof)

    def asked(self) -> dict[str, Any]:
        """As a question to Satmeter says it: no copy of a key leaves the proxy. A JWT is judged by what it says, so it is told whole."""
        key = (
            {"api_key": self.api_key}
            if self.is_jwt
            else {"api_key_hash": key_hash(self.api_key) if self.api_key else None}
        )
        return key | {"payment_proof": self.proof, "topup_offer": self.topup_offer}

    @property
    def sha256(self) -> str | None:
        """By which a call that was admitted is found again: of the key, or of the preimage, which an invoice shows; no secret."""
        return key_hash(self.api_key) if self.api_key else _payment_hash(self.proof or "")

    @property
    def is_jwt(self) -> bool:
        """Whether it has the shape of one: a JSON object in base64, and two parts more."""
        return self.api_key is not None and self.api_key.startswith("eyJ") and self.api_key.count(".") == _DOTS_OF_A_JWT

    @property
    def whose(self) -> str | None:
        """The same for whatever this caller shows: their next JWT is another text. Of a caller that was refused it proves nothing."""
        return _subject_hash(self.api_key or "") if self.is_jwt else self.sha256


def proof_in(headers: Mapping[str, str]) -> str | None:
    """The proof of payment in the Authorization header, if one is there; names in lower case."""
    authorization = headers.get("authorization", "").strip()
    return authorization if authorization.partition(" ")[0].lower() in _PROOFS else None


def offer_in(headers: Mapping[str, str]) -> str | None:
    return "none" if headers.get("x-topup-offer", "").strip().lower() == "none" else None


def key_hash(api_key: str) -> str:
    """What is sent in place of a key, so that no copy of it leaves the proxy."""
    return hashlib.sha256(api_key.encode("utf-8", "surrogateescape")).hexdigest()


def _subject_hash(token: str) -> str | None:
    payload = token.split(".")[1]
    try:
        told = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return key_hash(msgspec.json.encode([told["iss"], told["sub"]]).decode())
    except (ValueError, KeyError, TypeError, binascii.Error, msgspec.DecodeError, RecursionError):
        return None


def _payment_hash(proof: str) -> str | None:
    scheme, _, rest = proof.partition(" ")
    try:
        if scheme.lower() == "payment":
            told = msgspec.json.decode(base64.urlsafe_b64decode(rest.strip() + "=" * (-len(rest.strip()) % 4)))
            preimage = bytes.fromhex(told["payload"]["preimage"])
        else:
            preimage = bytes.fromhex(rest.rpartition(":")[2])
    except (ValueError, KeyError, TypeError, binascii.Error, msgspec.DecodeError):
        return None
    return hashlib.sha256(preimage).hexdigest()
