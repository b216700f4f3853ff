"""NIP-44, against the official vectors where they are at hand, and against nostr-sdk on every machine."""

import hashlib
import json
from pathlib import Path
from typing import Any

import nostr_sdk as sdk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.adapters import nip44
from app.adapters.nostr import CannotDecrypt, decrypt_nip04, encrypt_nip04, public_key, read_event, sign_event

VECTORS = Path(__file__).parents[2].parent / "shared" / "data" / "nip44.vectors.json"
VECTORS_SHA256 = "269ed0f69e4c192512cc779e78c555090cebc7c785b609e338a62afc3ce25040"  # as NIP-44 itself gives it
CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
OBSOLETE = {65536, 100000, 10000000}  # lengths the vectors refuse, and the spec takes since June 2026

secret_keys = st.integers(1, CURVE_ORDER - 1).map(lambda number: number.to_bytes(32, "big").hex())
plaintexts = st.text(min_size=1, max_size=2000) | st.integers(1, 6000).map(lambda length: "é" * length)
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    if not VECTORS.exists():
        pytest.skip("the official vectors are not at hand: ../shared/data/nip44.vectors.json")
    content = VECTORS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == VECTORS_SHA256
    vectors: dict[str, Any] = json.loads(content)["v2"]
    return vectors


def test_every_official_conversation_key_is_ours(vectors: dict[str, Any]) -> None:
    for one in vectors["valid"]["get_conversation_key"]:
        assert nip44.conversation_key(one["sec1"], one["pub2"]).hex() == one["conversation_key"]


def test_every_official_message_key_is_ours(vectors: dict[str, Any]) -> None:
    conversation = bytes.fromhex(vectors["valid"]["get_message_keys"]["conversation_key"])
    for one in vectors["valid"]["get_message_keys"]["keys"]:
        keys = nip44.message_keys(conversation, bytes.fromhex(one["nonce"]))
        assert keys.chacha_key.hex() == one["chacha_key"]
        assert keys.chacha_nonce.hex() == one["chacha_nonce"]
        assert keys.hmac_key.hex() == one["hmac_key"]


def test_every_official_length_is_padded_as_they_say(vectors: dict[str, Any]) -> None:
    for length_bytes, padded_bytes in vectors["valid"]["calc_padded_len"]:
        assert nip44.padded_bytes(length_bytes) == padded_bytes


def test_every_official_message_is_encrypted_to_the_same_bytes_and_decrypted(vectors: dict[str, Any]) -> None:
    for one in vectors["valid"]["encrypt_decrypt"]:
        conversation = nip44.conversation_key(one["sec1"], public_key(one["sec2"]))
        assert conversation.hex() == one["conversation_key"]
        assert nip44.encrypt(one["plaintext"], conversation, bytes.fromhex(one["nonce"])) == one["payload"]
        assert (
            nip44.decrypt(one["payload"], nip44.conversation_key(one["sec2"], public_key(one["sec1"])))
            == one["plaintext"]
        )


def test_every_official_long_message_is_encrypted_to_the_same_bytes_and_decrypted(vectors: dict[str, Any]) -> None:
    for one in vectors["valid"]["encrypt_decrypt_long_msg"]:
        plaintext, conversation = one["pattern"] * one["repeat"], bytes.fromhex(one["conversation_key"])
        payload = nip44.encrypt(plaintext, conversation, bytes.fromhex(one["nonce"]))
        assert hashlib.sha256(plaintext.encode()).hexdigest() == one["plaintext_sha256"]
        assert hashlib.sha256(payload.encode()).hexdigest() == one["payload_sha256"]
        assert nip44.decrypt(payload, conversation) == plaintext


def test_every_official_bad_length_is_refused_but_those_the_spec_has_taken_in_since(vectors: dict[str, Any]) -> None:
    refused = set(vectors["invalid"]["encrypt_msg_lengths"]) - OBSOLETE
    assert refused == {0}
    with pytest.raises(ValueError, match="1 to 4294967295 bytes, not 0"):
        nip44.encrypt("", KEY)


def test_every_official_bad_key_is_refused(vectors: dict[str, Any]) -> None:
    for one in vectors["invalid"]["get_conversation_key"]:
        with pytest.raises(ValueError):
            nip44.conversation_key(one["sec1"], one["pub2"])


def test_every_official_bad_payload_is_refused(vectors: dict[str, Any]) -> None:
    for one in vectors["invalid"]["decrypt"]:
        with pytest.raises(CannotDecrypt):
            nip44.decrypt(one["payload"], bytes.fromhex(one["conversation_key"]))


@given(ours=secret_keys, theirs=secret_keys, plaintext=plaintexts)
@settings(deadline=None, max_examples=150)
def test_nostr_sdk_and_we_read_each_others_nip44(ours: str, theirs: str, plaintext: str) -> None:
    we, they = sdk.Keys.parse(ours), sdk.Keys.parse(theirs)
    conversation = nip44.conversation_key(ours, they.public_key().to_hex())
    assert they.nip44_decrypt(we.public_key(), nip44.encrypt(plaintext, conversation)) == plaintext
    assert nip44.decrypt(they.nip44_encrypt(we.public_key(), plaintext), conversation) == plaintext


@given(ours=secret_keys, theirs=secret_keys, plaintext=plaintexts)
@settings(deadline=None, max_examples=100)
def test_nostr_sdk_and_we_read_each_others_nip04(ours: str, theirs: str, plaintext: str) -> None:
    we, they = sdk.Keys.parse(ours), sdk.Keys.parse(theirs)
    assert they.nip04_decrypt(we.public_key(), encrypt_nip04(ours, public_key(theirs), plaintext)) == plaintext
    assert decrypt_nip04(ours, public_key(theirs), they.nip04_encrypt(we.public_key(), plaintext)) == plaintext


@given(one=secret_keys, other=secret_keys)
@settings(deadline=None, max_examples=50)
def test_both_ends_have_the_same_conversation_key(one: str, other: str) -> None:
    assert nip44.conversation_key(one, public_key(other)) == nip44.conversation_key(other, public_key(one))


@pytest.mark.parametrize("length_bytes", [1, 31, 32, 33, 65_535, 65_536, 65_537, 100_000, 1_000_000])
def test_a_message_of_any_length_comes_back(length_bytes: int) -> None:
    plaintext = "x" * length_bytes
    assert nip44.decrypt(nip44.encrypt(plaintext, KEY), KEY) == plaintext


def test_the_length_is_two_bytes_below_65536_and_two_zeros_with_four_from_there() -> None:
    assert nip44.pad(b"x" * 65_535)[:3] == b"\xff\xffx"
    assert nip44.pad(b"x" * 65_536)[:7] == b"\0\0\0\x01\0\0x"
    assert len(nip44.pad(b"x" * 65_537)) == 6 + 65_536 + 8_192 * 2


@pytest.mark.parametrize(
    "padded",
    [
        b"",
        bytes(34),
        b"\0\0\0\0\0\x05hello" + bytes(27),  # a small length in the long form
        b"\0\x05hello" + bytes(26),  # one byte short
        b"\0\x05hello" + bytes(28),  # one byte long
        b"\0\x21hello" + bytes(27),  # more than there is
        b"\0\0\0\x01\0\0" + bytes(65_535),
    ],
)
def test_padding_that_does_not_fit_is_refused(padded: bytes) -> None:
    with pytest.raises(CannotDecrypt):
        nip44.unpad(padded)


@given(at=st.integers(0, 131), bit=st.integers(0, 7))
@settings(deadline=None)
def test_a_payload_with_one_flipped_bit_is_refused(at: int, bit: int) -> None:
    payload = bytearray(nip44.encrypt("pay", KEY, nonce=KEY).encode())
    payload[at] ^= 1 << bit
    with pytest.raises(CannotDecrypt):
        nip44.decrypt(payload.decode("latin-1"), KEY)


def test_the_same_message_never_looks_the_same_twice() -> None:
    assert len({nip44.encrypt("pay", KEY) for _ in range(20)}) == 20


@pytest.mark.parametrize(
    "payload", ["", "?iv=", "YQ==", "YQ==?iv=YQ==", "YWFhYWFhYWFhYWFhYWFhYQ==?iv=AAAAAAAAAAAAAAAAAAAAAA==", "é?iv=é"]
)
def test_what_is_no_nip04_is_refused(payload: str) -> None:
    with pytest.raises(CannotDecrypt):
        decrypt_nip04("01" * 32, public_key("02" * 32), payload)


@pytest.mark.parametrize(
    "secret", ["", "1", "01", "00" * 32, "ff" * 32, "AB" * 32, "0x" + "1" * 62, "1" * 63 + "\n", "١" * 64]
)
def test_what_is_no_secret_key_is_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(ValueError) as refusal:
        public_key(secret)
    assert len(secret) < 3 or secret not in str(refusal.value)


# Events


def test_nostr_sdk_believes_our_events_and_we_believe_its() -> None:
    keys = sdk.Keys.generate()
    ours = sign_event(keys.secret_key().to_hex(), kind=1, content='"quotes"\n\\ é 🦄 \x7f\b', tags=[["p", "00"], ["x"]])
    assert sdk.Event.from_json(json.dumps(ours)).verify()
    theirs = sdk.EventBuilder(sdk.Kind(1), "é\t\x01").tags([sdk.Tag.parse(["e", "0" * 64])]).finalize(keys)
    assert read_event(theirs.as_json().encode(), {}) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"id": "00" * 32},
        {"id": 5},
        {"content": "pay me"},
        {"content": "\ud800"},
        {"content": None},
        {"created_at": 1},
        {"created_at": True},
        {"created_at": 2**80},
        {"kind": 2},
        {"tags": [["p"], 1]},
        {"tags": None},
        {"pubkey": "ff" * 32},
        {"pubkey": "ab"},
        {"pubkey": "00" * 32 + "\n"},
        {"sig": "00" * 64},
        {"sig": "zz" * 64},
        {"sig": ""},
    ],
    ids=lambda change: str(change)[:30].encode("ascii", "backslashreplace").decode(),
)
def test_an_event_with_anything_changed_is_not_believed(change: dict[str, Any]) -> None:
    event = sign_event("01" * 32, kind=1, content="hello", tags=[["p", "00"]])
    assert read_event(json.dumps(event).encode(), {}) is not None
    assert read_event(json.dumps(event | change).encode(), {}) is None


@pytest.mark.parametrize("raw", [None, 1, "event", [], {}, {"id": "00" * 32}])
def test_what_has_not_the_shape_of_an_event_is_none(raw: Any) -> None:
    assert read_event(json.dumps(raw).encode(), {}) is None
