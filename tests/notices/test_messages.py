"""Nostr direct messages over a relay, read by another library that knows nothing of us (NIP-17)."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from nostr_sdk import Event, EventBuilder, Keys, Kind, Tag, UnwrappedGift

from app.adapters.direct_messages import NostrMessages, wrapped
from app.adapters.nostr import public_key
from app.adapters.relay import Dialler
from app.notices.ways import Outcome
from tests.adapters.fake_relay import FakeRelay
from tests.integration.real_relay import RealRelay
from tests.program import free_ports

SECRET = "5c" * 32
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


def read(event: dict[str, object], keys: Keys) -> dict[str, object]:
    """The rumor inside, unwrapped and proved by the other library."""
    gift = UnwrappedGift.from_gift_wrap(keys, Event.from_json(json.dumps(event)))
    assert gift.sender().to_hex() == public_key(SECRET)
    return dict(json.loads(gift.rumor().as_json()))


def test_another_library_reads_the_message_and_who_sent_it() -> None:
    keys = Keys.generate()
    key = keys.public_key().to_hex()
    first, second = (wrapped(SECRET, key, "Your balance is low: €4.20 ✓", 1_780_000_000) for _ in range(2))
    rumor = read(first, keys)
    assert (rumor["kind"], rumor["content"], rumor["tags"]) == (14, "Your balance is low: €4.20 ✓", [["p", key]])
    assert rumor["created_at"] == 1_780_000_000
    assert read(second, keys)["id"] == rumor["id"]  # a repeat is known by it
    assert (first["kind"], first["tags"]) == (1059, [["p", key]])
    assert first["pubkey"] not in (second["pubkey"], public_key(SECRET))


def test_keys_are_read_and_written_as_people_have_them() -> None:
    keys = Keys.generate()
    messages = NostrMessages(Dialler(allow_private=True), SECRET, [])
    npub, key = keys.public_key().to_bech32(), keys.public_key().to_hex()
    assert (messages.key_of(npub), messages.key_of(key), messages.npub_of(key)) == (key, key, npub)
    assert messages.npub == messages.npub_of(public_key(SECRET))


async def test_a_message_goes_to_the_relays_that_its_receiver_lists_else_to_ours() -> None:
    keys = Keys.generate()
    key = keys.public_key().to_hex()
    async with FakeRelay(stores=True) as ours, FakeRelay(stores=True) as theirs:
        messages = NostrMessages(Dialler(allow_private=True), SECRET, [ours.url])
        assert (await messages.send(key, "first", NOW)).outcome is Outcome.DELIVERED
        assert [read(each, keys)["content"] for each in ours.published] == ["first"]
        listed = EventBuilder(Kind(10050), "").tags([Tag.parse(["relay", theirs.url])]).finalize(keys)
        ours._stored.append(json.loads(listed.as_json()))
        assert (await messages.send(key, "second", NOW)).outcome is Outcome.DELIVERED
        assert [read(each, keys)["content"] for each in theirs.published] == ["second"]


async def test_relays_that_refuse_or_are_not_there_are_a_failure_and_a_listed_private_one_is_not_dialled() -> None:
    key = Keys.generate().public_key().to_hex()
    async with FakeRelay(refuses="blocked: no") as relay:
        messages = NostrMessages(Dialler(allow_private=True), SECRET, [relay.url, "ws://127.0.0.1:9/"])
        assert (await messages.send(key, "x", NOW)).outcome is Outcome.FAILED
        careful = NostrMessages(Dialler(allow_private=False), SECRET, [relay.url])
        assert (await careful.send(key, "x", NOW)).outcome is Outcome.FAILED
    assert len(relay.published) == 1


@pytest.mark.slow
async def test_a_real_relay_takes_the_message_and_hands_it_to_its_receiver(tmp_path: Path) -> None:
    keys = Keys.generate()
    relay = RealRelay(tmp_path, free_ports(1)[0])
    await relay.start()
    try:
        messages = NostrMessages(Dialler(allow_private=True), SECRET, [relay.url])
        assert (await messages.send(keys.public_key().to_hex(), "over a real relay", NOW)).outcome is Outcome.DELIVERED
        async with Dialler(allow_private=True).open(relay.url, SECRET) as opened:
            await opened.subscribe({"kinds": [1059], "#p": [keys.public_key().to_hex()]})
            [event] = opened.stored()
        assert read(_plain(event), keys)["content"] == "over a real relay"
    finally:
        await relay.stop()


def _plain(event: object) -> dict[str, object]:
    return {name: getattr(event, name) for name in ("id", "pubkey", "created_at", "kind", "tags", "content", "sig")}
