"""The two ways to write to a Nostr key so that only its owner reads it: NIP-44 version 2, and the older NIP-04.

The service has a NIP-44 of its own in its adapters. This one shares no line with it, on purpose: the sandbox is a
stranger, and when the two understand each other, neither has misread the specification in a way of its own.
"""

import base64
import hmac
import math
import secrets
from enum import StrEnum

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from pynostr.key import PrivateKey

VERSION = b"\x02"
MAX_PLAIN_BYTES = 65535


class Scheme(StrEnum):
    """In NIP-47's words."""

    NIP44 = "nip44_v2"
    NIP04 = "nip04"


def scheme_of(payload: str) -> Scheme:
    """NIP-04 says so by its `?iv=`."""
    return Scheme.NIP04 if "?iv=" in payload else Scheme.NIP44


def seal(scheme: Scheme, secret: str, other: str, text: str) -> str:
    """Write `text` from the owner of `secret` to the owner of the public key `other`, both in hex."""
    if scheme is Scheme.NIP04:
        return str(_key(secret).encrypt_message(text, other))
    return seal_44(conversation_key(secret, other), text, secrets.token_bytes(32))


def unseal(scheme: Scheme, secret: str, other: str, payload: str) -> str:
    """Read what the owner of the public key `other` wrote to the owner of `secret`. Raises ValueError."""
    if scheme is Scheme.NIP44:
        return unseal_44(conversation_key(secret, other), payload)
    if payload.count("?iv=") != 1:
        raise ValueError("this is not NIP-04")
    return str(_key(secret).decrypt_message(payload, other))


# --- NIP-44, version 2 ---


def conversation_key(secret: str, other: str) -> bytes:
    """What both owners can compute and nobody else can."""
    return hmac.digest(b"nip44-v2", _key(secret).ecdh(other), "sha256")


def seal_44(key: bytes, text: str, nonce: bytes) -> str:
    """Raises ValueError for a text of more than 65535 bytes, or none."""
    cipher_key, cipher_nonce, mac_key = _message_keys(key, nonce)
    hidden = _chacha20(cipher_key, cipher_nonce, _pad(text.encode()))
    mac = hmac.digest(mac_key, nonce + hidden, "sha256")
    return base64.b64encode(VERSION + nonce + hidden + mac).decode()


def unseal_44(key: bytes, payload: str) -> str:
    """Raises ValueError for whatever was not written with this key."""
    if not 132 <= len(payload) <= 87472:
        raise ValueError("this is not NIP-44: its length is impossible")
    raw = base64.b64decode(payload, validate=True)
    version, nonce, hidden, mac = raw[:1], raw[1:33], raw[33:-32], raw[-32:]
    if version != VERSION or len(raw) < 99:
        raise ValueError("this is not NIP-44 version 2")
    cipher_key, cipher_nonce, mac_key = _message_keys(key, nonce)
    if not hmac.compare_digest(hmac.digest(mac_key, nonce + hidden, "sha256"), mac):
        raise ValueError("it was not written with this key")
    return _unpad(_chacha20(cipher_key, cipher_nonce, hidden))


def padded_length(length: int) -> int:
    """How many bytes a text of `length` bytes is padded to, so that its length tells little."""
    if length <= 32:
        return 32
    power = 1 << math.floor(math.log2(length - 1)) + 1
    chunk = 32 if power <= 256 else power // 8
    return chunk * ((length - 1) // chunk + 1)


def _message_keys(key: bytes, nonce: bytes) -> tuple[bytes, bytes, bytes]:
    keys = HKDFExpand(SHA256(), 76, nonce).derive(key)
    return keys[:32], keys[32:44], keys[44:]


def _chacha20(key: bytes, nonce: bytes, data: bytes) -> bytes:
    # The library takes the block counter, from zero, as the first four bytes of a sixteen byte nonce.
    return Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), mode=None).encryptor().update(data)


def _pad(plain: bytes) -> bytes:
    if not 1 <= len(plain) <= MAX_PLAIN_BYTES:
        raise ValueError(f"{len(plain)} bytes cannot be written; 1 to {MAX_PLAIN_BYTES} can")
    return len(plain).to_bytes(2, "big") + plain.ljust(padded_length(len(plain)), b"\0")


def _unpad(padded: bytes) -> str:
    length = int.from_bytes(padded[:2], "big")
    plain = padded[2 : 2 + length]
    if length == 0 or len(plain) != length or len(padded) != 2 + padded_length(length):
        raise ValueError("its padding is wrong")
    return plain.decode()


def _key(secret: str) -> PrivateKey:
    return PrivateKey(bytes.fromhex(secret))
