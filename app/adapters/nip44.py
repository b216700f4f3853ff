"""NIP-44 version 2: encryption between two Nostr keys, on `cryptography`. Pure but for its nonces.

    payload = base64( 2 ‖ nonce 32 ‖ ciphertext ‖ mac 32 )
    ECDH's X ── HKDF extract ── conversation key ── HKDF expand by nonce ── ChaCha20 key 32, its nonce 12, HMAC key 32

Source: NIP-44 as of June 2026, which lets a plaintext of 65,536 bytes or more carry a longer length. The official
vectors are older and list such lengths as invalid.
"""

import base64
import binascii
import secrets
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from app.adapters.nostr import CannotDecrypt, shared_x

VERSION: Final = 2
MAX_PLAINTEXT_BYTES: Final = 2**32 - 1

_EXTENDED_FROM_BYTES: Final = 65_536
_NONCE_BYTES: Final = 32
_MAC_BYTES: Final = 32
_MIN_PAYLOAD_BYTES: Final = 1 + _NONCE_BYTES + (2 + 32) + _MAC_BYTES


@dataclass(frozen=True, slots=True)
class MessageKeys:
    """The keys of one message, from its conversation key and its nonce."""

    chacha_key: bytes = field(repr=False)
    chacha_nonce: bytes = field(repr=False)
    hmac_key: bytes = field(repr=False)


def encrypt(plaintext: str, conversation: bytes, nonce: bytes | None = None) -> str:
    """The payload, in base64. A nonce (32 bytes) is given by tests only; used twice, it gives both messages away.

    Raises ValueError for an empty plaintext or one of more than 2**32 - 1 bytes.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES) if nonce is None else nonce
    keys = message_keys(conversation, nonce)
    ciphertext = _chacha20(keys, pad(plaintext.encode()))
    mac = _hmac(keys, nonce, ciphertext).finalize()
    return base64.b64encode(bytes([VERSION]) + nonce + ciphertext + mac).decode()


def decrypt(payload: str, conversation: bytes) -> str:
    """The plaintext. Raises CannotDecrypt, and looks at nothing inside before the MAC was found right."""
    nonce, ciphertext, mac = _taken_apart(payload)
    keys = message_keys(conversation, nonce)
    try:
        _hmac(keys, nonce, ciphertext).verify(mac)  # in constant time
        return unpad(_chacha20(keys, ciphertext)).decode()
    except InvalidSignature:
        raise CannotDecrypt("the MAC does not fit") from None
    except UnicodeDecodeError:
        raise CannotDecrypt("the plaintext is not UTF-8") from None


def conversation_key(secret: str, pubkey: str) -> bytes:
    """32 bytes, the same for both ends. Keys are 64 hex digits; raises ValueError if one is not on the curve."""
    return HKDF.extract(SHA256(), b"nip44-v2", shared_x(secret, pubkey))


def message_keys(conversation: bytes, nonce: bytes) -> MessageKeys:
    assert len(conversation) == 32, "a conversation key has 32 bytes"
    assert len(nonce) == _NONCE_BYTES, "a nonce has 32 bytes"
    okm = HKDFExpand(SHA256(), 76, nonce).derive(conversation)
    return MessageKeys(chacha_key=okm[:32], chacha_nonce=okm[32:44], hmac_key=okm[44:])


def padded_bytes(length_bytes: int) -> int:
    """How many bytes a plaintext fills: 32 at least, then steps of an eighth of the power of two it stays under."""
    assert length_bytes > 0, "an empty plaintext is not padded"
    power = 1 << (length_bytes - 1).bit_length()
    step = max(32, power // 8)
    return step * -(-length_bytes // step)


def pad(plaintext: bytes) -> bytes:
    """length ‖ plaintext ‖ zeros. Raises ValueError if it is empty or too long."""
    length = len(plaintext)
    if not 1 <= length <= MAX_PLAINTEXT_BYTES:
        raise ValueError(f"a plaintext has 1 to {MAX_PLAINTEXT_BYTES} bytes, not {length}")
    return _length_prefix(length) + plaintext + bytes(padded_bytes(length) - length)


def unpad(padded: bytes) -> bytes:
    """Raises CannotDecrypt if the length is zero, is not written the shortest way, or does not fit the padding."""
    length, start = int.from_bytes(padded[:2], "big"), 2
    if length == 0:
        length, start = int.from_bytes(padded[2:6], "big"), 6
    # Compared as a whole, so that a small length in the long form is refused.
    if length == 0 or not padded.startswith(_length_prefix(length)) or len(padded) != start + padded_bytes(length):
        raise CannotDecrypt("the padding does not fit")
    return padded[start : start + length]


def _length_prefix(length: int) -> bytes:
    if length < _EXTENDED_FROM_BYTES:
        return length.to_bytes(2, "big")
    return bytes(2) + length.to_bytes(4, "big")


def _taken_apart(payload: str) -> tuple[bytes, bytes, bytes]:
    """Nonce, ciphertext, MAC. Raises CannotDecrypt for what is not version 2, of whatever length."""
    if payload.startswith("#"):
        raise CannotDecrypt("a version newer than we know")  # NIP-44 keeps the sign for versions that are not base64
    try:
        raw = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise CannotDecrypt("not base64") from None
    if len(raw) < _MIN_PAYLOAD_BYTES or raw[0] != VERSION:
        raise CannotDecrypt("too short, or of another version")
    return raw[1 : 1 + _NONCE_BYTES], raw[1 + _NONCE_BYTES : -_MAC_BYTES], raw[-_MAC_BYTES:]


def _chacha20(keys: MessageKeys, text: bytes) -> bytes:
    # `cryptography` wants the 4 bytes of the block counter, little-endian and zero here, before the nonce's 12.
    cipher = Cipher(algorithms.ChaCha20(keys.chacha_key, bytes(4) + keys.chacha_nonce), mode=None)
    return cipher.encryptor().update(text)


def _hmac(keys: MessageKeys, nonce: bytes, ciphertext: bytes) -> HMAC:
    """Over the nonce too, as its associated data."""
    mac = HMAC(keys.hmac_key, SHA256())
    mac.update(nonce + ciphertext)
    return mac
