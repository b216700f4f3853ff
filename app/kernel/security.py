"""Secrets: how they are made, compared, looked up and sealed; and who is calling.

What we only compare is stored as HMAC(pepper, SHA-256(secret)); what we must give back is sealed with
AES-256-GCM, bound to its row, so that a ciphertext moved to another row does not open.
"""

import hashlib
import hmac
import re
import secrets
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_TEXT = re.compile(r"(sk|svc|adm)-([0-9A-Za-z]{43})([0-9A-Za-z]{6})", re.ASCII)
_JWT_TEXT = re.compile(r"eyJ[0-9A-Za-z_-]+\.[0-9A-Za-z_-]+\.[0-9A-Za-z_-]+", re.ASCII)
MOST_JWT_CHARS = 8192
_CREDIT_ID_TEXT = re.compile(
    r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}", re.ASCII
)


class Kind(StrEnum):
    """Which sort of credential somebody showed."""

    CREDIT_ID = "credit_id"
    API_KEY = "api_key"
    RECOVERY_CODE = "recovery_code"
    NOSTR = "nostr"


Lasts: TypeAlias = Literal["lasting", "ending", "over"]
"""How a credential stands: for good, until the end of its overlap, or no more."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: an account, by its credit id or by one of its keys.

    `scopes` None means everything that kind of credential may do. `lookup` is the hash of what was shown, by which the
    act's own transaction asks again whether it still holds.
    """

    kind: Kind
    account_id: uuid.UUID
    key_id: uuid.UUID | None = None
    scopes: frozenset[str] | None = None
    lasts: Lasts = "lasting"
    lookup: bytes | None = field(default=None, repr=False, compare=False)


OnExpiry: TypeAlias = Literal["captured", "hold", "release"]
"""What becomes of a hold that nobody settles: what was captured is charged, or all that is held, or nothing."""


@dataclass(frozen=True, slots=True)
class Service:
    """An operator's inference proxy, known by its service token. `on_expiry` is for holds that are made without one."""

    id: uuid.UUID
    name: str
    on_expiry: OnExpiry = "captured"


@dataclass(frozen=True, slots=True)
class Admin:
    """An operator, known by an admin token, or by who runs a command.

    `scopes` None means everything an operator may do. `request_id` is of the request that this operator made.
    """

    id: uuid.UUID
    name: str
    scopes: frozenset[str] | None = None
    request_id: str | None = None


def new_secret(prefix: str) -> str:
    """`sk-`, `svc-` or `adm-` + 43 base62 (256 random bits) + 6 checksum digits."""
    body = _base62(int.from_bytes(secrets.token_bytes(32)), 43)
    return f"{prefix}-{body}{_checksum(prefix, body)}"


def is_wellformed(secret: str, prefix: str) -> bool:
    """Whether the checksum fits: rejects typos without asking the database; proves nothing else."""
    match = _SECRET_TEXT.fullmatch(secret)
    return match is not None and match[1] == prefix and match[3] == _checksum(match[1], match[2])


def is_jwt(secret: str) -> bool:
    """Whether it has the shape of a signed JWT in compact form, which begins with a JSON object; proves nothing else."""
    return secret.startswith("eyJ") and len(secret) <= MOST_JWT_CHARS and _JWT_TEXT.fullmatch(secret) is not None


def subject_hash(issuer: str, subject: str) -> bytes:
    """What stands for a JWT's subject where a key has its SHA-256. It is no secret, and opens nothing: see `lookup_subject`."""
    named = [text.encode() for text in ("jwt", issuer, subject)]
    return hashlib.sha256(b"".join([len(part).to_bytes(4) + part for part in named])).digest()


def new_credit_id() -> str:
    """A UUIDv4: 122 random bits; never a v1 or v7, which could be guessed from the time."""
    return str(uuid.uuid4())


def canonical_credit_id(text: str) -> str | None:
    """The one spelling we hash, or None: `uuid.UUID` would accept braces, urn: and missing hyphens."""
    return text.lower() if _CREDIT_ID_TEXT.fullmatch(text) else None


_CODE_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_CODE_READ = str.maketrans("OIL", "011", "- \t\r\n")
_CODE_DATA, _CODE_GROUP = 26, 5


def new_recovery_code() -> str:
    """26 digits of Crockford's base 32 (130 random bits) and 4 of a checksum, in six groups of five.

    For paper: it has no I, L, O and U.
    """
    body = "".join(secrets.choice(_CODE_DIGITS) for _ in range(_CODE_DATA))
    code = body + _code_checksum(body)
    return "-".join(code[at : at + _CODE_GROUP] for at in range(0, len(code), _CODE_GROUP))


def canonical_recovery_code(text: str) -> str | None:
    """The one spelling we hash, or None. Hyphens, spaces and case are the writer's; O is read as 0, I and L as 1."""
    code = text.upper().translate(_CODE_READ) if len(text) <= 100 and text.isascii() else ""
    body, checksum = code[:_CODE_DATA], code[_CODE_DATA:]
    is_whole = len(body) == _CODE_DATA and set(body) <= set(_CODE_DIGITS) and checksum == _code_checksum(body)
    return code if is_whole else None


def _code_checksum(body: str) -> str:
    value = int.from_bytes(hashlib.sha256(f"recovery/{body}".encode()).digest()[:4])
    return "".join(_CODE_DIGITS[value >> shift & 31] for shift in (15, 10, 5, 0))


def preview(secret: str) -> str:
    """What may be shown of a key for ever: `sk-abc…wxyz`."""
    return f"{secret[:6]}…{secret[-4:]}"


def _base62(value: int, width: int) -> str:
    digits = []
    for _ in range(width):
        value, digit = divmod(value, 62)
        digits.append(BASE62[digit])
    return "".join(reversed(digits))


def _checksum(prefix: str, body: str) -> str:
    return _base62(zlib.crc32(f"{prefix}-{body}".encode()), 6)


class Pepper:
    """The key of every lookup hash; a stolen database without it cannot even confirm a guess."""

    __slots__ = ("_mac", "_quick")

    def __init__(self, key: bytes) -> None:
        assert len(key) >= 32
        self._mac = hmac.new(key, digestmod="sha256")
        self._quick: dict[bytes, hashlib.blake2b] = {}

    def lookup(self, secret: str) -> bytes:
        """HMAC(pepper, SHA-256(secret)): 32 bytes, what the credential table is keyed by."""
        return self.lookup_hashed(hashlib.sha256(secret.encode()).digest())

    def lookup_hashed(self, sha256: bytes) -> bytes:
        """The same for a proxy that only kept the key's SHA-256."""
        return self._hmac(b"lookup\x00" + sha256)

    def lookup_subject(self, subject: bytes) -> bytes:
        """The same for the subject of a JWT, which anybody may know: so no hash that a proxy tells leads to one."""
        return self._hmac(b"subject\x00" + subject)

    def tag(self, purpose: bytes, *parts: bytes) -> bytes:
        """A 16-byte MAC over length-framed parts, one key per purpose."""
        framed = b"".join([len(part).to_bytes(4) + part for part in parts])
        return self._hmac(purpose + b"\x00" + framed)[:16]

    def masked(self, value: bytes, purpose: bytes, row: bytes) -> bytes:
        """32 bytes under a pad that the pepper makes for this row alone; masked twice they are themselves again."""
        assert len(value) == 32
        pad = self._hmac(b"mask\x00" + purpose + b"\x00" + row)
        return bytes(left ^ right for left, right in zip(value, pad, strict=True))

    def derived_key(self, purpose: bytes) -> bytes:
        """32 bytes that are the same as long as the pepper is, for a key that need not be kept."""
        return self._hmac(b"key\x00" + purpose)

    def quick_tag(self, purpose: bytes, message: bytes) -> bytes:
        """A 16-byte MAC for what is tagged at every call, one key per purpose: keyed BLAKE2b takes half of HMAC's time."""
        mac = self._quick.get(purpose)
        if mac is None:
            mac = self._quick[purpose] = hashlib.blake2b(key=self._hmac(b"quick\x00" + purpose), digest_size=16)
        mac = mac.copy()
        mac.update(message)
        return mac.digest()

    def _hmac(self, message: bytes) -> bytes:
        mac = self._mac.copy()  # keyed once: that is most of a short message's cost
        mac.update(message)
        return mac.digest()


class UnsealError(Exception):
    """The sealed value does not open: wrong key, wrong row, or altered."""


class Sealer:
    """Seals secrets under the first key and opens them under any; each value is bound to its row."""

    __slots__ = ("_current_id", "_keys")

    def __init__(self, keys: Iterable[tuple[str, bytes]]) -> None:
        named = list(keys)
        assert named
        assert len({key_id for key_id, _ in named}) == len(named)
        self._current_id = named[0][0]
        self._keys = {key_id: AESGCM(key) for key_id, key in named}

    @property
    def current_id(self) -> str:
        return self._current_id

    def seal(self, plaintext: bytes, row: str) -> str:
        """`<key id>.<hex of nonce + ciphertext>`; opens only for the same `row`, such as `api_key/<account>/<key>`."""
        return f"{self._current_id}.{self._encrypted(plaintext, row).hex()}"

    def open(self, sealed: str, row: str) -> bytes:
        """Raises UnsealError, with no secret in it."""
        key_id, _, payload = sealed.partition(".")
        try:
            data = bytes.fromhex(payload)
        except ValueError:
            data = b""
        return self._decrypted(key_id, data, row)

    def seal_bytes(self, plaintext: bytes, row: str) -> bytes:
        """The same as bytes, for what may be long: `<key id>.<nonce + ciphertext>`, 28 bytes more than the text and the id."""
        return self._current_id.encode() + b"." + self._encrypted(plaintext, row)

    def open_bytes(self, sealed: bytes, row: str) -> bytes:
        """Raises UnsealError, with no secret in it."""
        key_id, _, data = sealed.partition(b".")
        return self._decrypted(key_id.decode("latin-1"), data, row)

    def _encrypted(self, plaintext: bytes, row: str) -> bytes:
        nonce = secrets.token_bytes(12)
        return nonce + self._keys[self._current_id].encrypt(nonce, plaintext, self._bound(self._current_id, row))

    def _decrypted(self, key_id: str, data: bytes, row: str) -> bytes:
        try:
            return self._keys[key_id].decrypt(data[:12], data[12:], self._bound(key_id, row))
        except (KeyError, ValueError, InvalidTag):
            raise UnsealError(
                f"a sealed value of {row.partition('/')[0]} does not open with the sealing keys given"
            ) from None

    def is_current(self, sealed: str) -> bool:
        return sealed.partition(".")[0] == self._current_id

    @staticmethod
    def _bound(key_id: str, row: str) -> bytes:
        return f"satmeter/1/{key_id}/{row}".encode()


@dataclass(frozen=True, slots=True)
class Resealed:
    """How many secrets were sealed anew (or forgotten), and how many do not open and stay as they are."""

    done: int = 0
    unreadable: int = 0

    def __add__(self, other: "Resealed") -> "Resealed":
        return Resealed(self.done + other.done, self.unreadable + other.unreadable)


def equal(left: bytes, right: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(left, right)
