"""The relay as Nostr clients meet it: nostr-sdk's, which knows nothing of us, and a plain WebSocket for the wire's corners."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from nostr_sdk import Client, EventBuilder, Filter, Keys, Kind, RelayUrl, ReqTarget, Tag
from nostr_sdk import Event as SdkEvent
from websockets.asyncio.client import ClientConnection, connect

from app.sandbox import relay as limits
from app.sandbox.nostr import Event, event_id, public_key, read_event, read_filter, sign
from app.sandbox.relay import EPHEMERAL_SECONDS, Refused, Relay, Visitor

from .conftest import Shop

ALICE, BOB = "11" * 32, "22" * 32
NOW = 1_900_000_000


def an_event(kind: int = 1, at: int = NOW, secret: str = ALICE, content: str = "x", **tags: str) -> Event:
    return sign(secret, kind, content, [[name, value] for name, value in tags.items()], at)


class Plain:
    """A client that says and hears single messages."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def say(self, *message: Any) -> None:
        await self._socket.send(json.dumps(message))

    async def say_text(self, text: str | bytes) -> None:
        await self._socket.send(text)

    async def hear(self) -> Any:
        return json.loads(await asyncio.wait_for(self._socket.recv(), 10))

    async def publish(self, event: Event) -> Any:
        await self.say("EVENT", json.loads(as_json(event)))
        return await self.hear()


def as_json(event: Event) -> str:
    fields = ("id", "pubkey", "created_at", "kind", "tags", "content", "sig")
    return json.dumps({name: getattr(event, name) for name in fields})


def address(port: Shop) -> str:
    return str(port.client.base_url).replace("http", "ws", 1).rstrip("/") + "/relay"


@asynccontextmanager
async def plain(port: Shop) -> AsyncIterator[Plain]:
    async with connect(address(port), proxy=None) as socket:
        yield Plain(socket)


@asynccontextmanager
async def sdk(port: Shop) -> AsyncIterator[Client]:
    client = Client()
    await client.add_relay(RelayUrl.parse(address(port)))
    await client.connect()
    try:
        yield client
    finally:
        await client.shutdown()


async def fetched(client: Client, filter: Filter) -> list[SdkEvent]:
    return list(await client.fetch_events(ReqTarget.auto([filter]), timeout=timedelta(seconds=10)))


# --- a client that knows nothing of us ---


async def test_another_librarys_client_publishes_and_finds_its_event(port: Shop) -> None:
    keys = Keys.generate()
    event = EventBuilder(Kind(1), 'hello ✓ \n "quoted" \\ ').tags([Tag.parse(["t", "x"])]).finalize(keys)
    async with sdk(port) as client:
        sent = await client.send_event(event)
        assert [str(url) for url in sent.success] == [address(port)]
        found = await fetched(client, Filter().author(keys.public_key()).kind(Kind(1)))
        assert [each.id().to_hex() for each in found] == [event.id().to_hex()]


async def test_another_librarys_client_is_told_of_what_is_published_later(port: Shop) -> None:
    async with plain(port) as reader, sdk(port) as client:
        keys = Keys.generate()
        await reader.say("REQ", "s", {"authors": [keys.public_key().to_hex()]})
        assert await reader.hear() == ["EOSE", "s"]
        event = EventBuilder(Kind(23194), "later").finalize(keys)
        await client.send_event(event)
        verb, id, told = await reader.hear()
        assert (verb, id, told["id"]) == ("EVENT", "s", event.id().to_hex())


async def test_our_signatures_are_valid_to_another_library() -> None:
    event = an_event(content="ünï \u2028 \x7f \t\b\f", e="00" * 32)
    assert SdkEvent.from_json(as_json(event)).verify()


async def test_another_librarys_forged_event_is_refused(port: Shop) -> None:
    event = json.loads(EventBuilder(Kind(1), "mine").finalize(Keys.generate()).as_json())
    async with plain(port) as client:
        await client.say("EVENT", event | {"content": "yours"})
        assert (await client.hear())[2:] == [False, "invalid: the id is not the hash of the event"]
        forged = json.loads(as_json(an_event())) | {"sig": event["sig"]}
        await client.say("EVENT", forged)
        assert (await client.hear())[2:] == [False, "invalid: the signature is not the author's"]
    async with sdk(port) as sdk_client:
        assert await fetched(sdk_client, Filter()) != []  # the wallet's info event, and nothing else
        assert {each.kind().as_u16() for each in await fetched(sdk_client, Filter())} == {13194}


# --- the wire ---


async def test_what_is_no_message_is_answered_and_the_talk_goes_on(port: Shop) -> None:
    async with plain(port) as client:
        for text in ("", "nonsense", "{}", "[]", '["AUTH", {}]', '["REQ"]', b"\xff", '["EVENT"]', '["CLOSE"]'):
            await client.say_text(text)
            assert (await client.hear())[0] == "NOTICE", text
        await client.say("EVENT", {"id": 5})
        assert (await client.hear())[:3] == ["OK", "", False]
        await client.say("REQ", "s", {"kinds": ["many"]})
        assert (await client.hear())[:2] == ["CLOSED", "s"]
        await client.say("REQ", "s", {"search": "what this relay cannot"})
        assert (await client.hear())[:2] == ["CLOSED", "s"]
        assert (await client.publish(an_event(at=int(time.time()))))[2] is True


async def test_a_message_too_long_is_refused(port: Shop) -> None:
    async with plain(port) as client:
        await client.say("EVENT", "x" * limits.MAX_MESSAGE_CHARS)
        assert (await client.hear())[0] == "NOTICE"


async def test_nobody_subscribes_without_end(port: Shop) -> None:
    async with plain(port) as client:
        for number in range(limits.MAX_SUBSCRIPTIONS):
            await client.say("REQ", str(number), {"kinds": [1]})
            assert await client.hear() == ["EOSE", str(number)]
        await client.say("REQ", "one more", {})
        assert (await client.hear())[0] == "CLOSED"
        await client.say("CLOSE", "0")
        await client.say("REQ", "one more", {"kinds": [1]})
        assert await client.hear() == ["EOSE", "one more"]
        await client.say("REQ", "1", *[{"kinds": [1]}] * (limits.MAX_FILTERS + 1))
        assert (await client.hear())[0] == "CLOSED"


async def test_a_closed_subscription_is_told_nothing_and_a_repeated_one_replaces_itself(port: Shop) -> None:
    now = int(time.time())
    async with plain(port) as reader, plain(port) as writer:
        await reader.say("REQ", "a", {"kinds": [1]})
        await reader.say("REQ", "a", {"kinds": [2]})
        await reader.say("REQ", "b", {"kinds": [3]})
        await reader.say("CLOSE", "b")
        assert [await reader.hear() for _ in range(3)] == [["EOSE", "a"], ["EOSE", "a"], ["EOSE", "b"]]
        for kind in (1, 3, 2):
            assert (await writer.publish(an_event(kind, now)))[2] is True
        assert (await reader.hear())[2]["kind"] == 2


async def test_the_relay_describes_itself(port: Shop) -> None:
    answer = await port.client.get("/relay", headers={"Accept": "application/nostr+json"})
    assert answer.headers["content-type"].startswith("application/nostr+json")
    assert 1 in answer.json()["supported_nips"]


# --- what is kept ---


class Clockwork:
    """A relay, its clock, and a visitor."""

    def __init__(self) -> None:
        self.now = float(NOW)
        self.relay = Relay(lambda: self.now)
        self.said: list[Any] = []
        self.visitor = Visitor(self.relay, lambda text: self.said.append(json.loads(text)))

    def kept(self, **filter: Any) -> list[Event]:
        return self.relay.stored([read_filter(filter)])


@pytest.fixture
def clockwork() -> Clockwork:
    return Clockwork()


def test_every_condition_of_a_filter_holds(clockwork: Clockwork) -> None:
    one = an_event(1, NOW - 10, ALICE, e="aa", p="bb")
    two = an_event(2, NOW - 20, BOB, e="cc")
    for event in (one, two):
        clockwork.relay.take(event)
    for condition in (
        {"ids": [one.id]}, {"authors": [public_key(ALICE)]}, {"kinds": [1, 7]}, {"since": NOW - 10}, {"#e": ["aa", "zz"]},
        {"#p": ["bb"], "kinds": [1]}, {"limit": 1},
    ):  # fmt: skip
        assert clockwork.kept(**condition) == [one], condition
    for condition in ({"until": NOW - 20}, {"#e": ["cc"]}, {"until": NOW - 11, "since": NOW - 20}):
        assert clockwork.kept(**condition) == [two], condition
    nothing: list[dict[str, Any]] = [
        {"ids": []},
        {"#p": ["bb"], "kinds": [2]},
        {"limit": 0},
        {"kinds": [1], "#e": ["cc"]},
    ]
    for condition in nothing:
        assert clockwork.kept(**condition) == [], condition
    assert clockwork.kept() == [one, two]


def test_filters_are_alternatives_each_with_its_own_limit(clockwork: Clockwork) -> None:
    events = [an_event(kind, NOW - age, content=str(age)) for kind in (1, 2) for age in range(3)]
    for event in events:
        clockwork.relay.take(event)
    filters = [read_filter({"kinds": [1], "limit": 1}), read_filter({"kinds": [2], "limit": 2})]
    found = clockwork.relay.stored(filters)
    assert sorted((event.kind, NOW - event.created_at) for event in found) == [(1, 0), (2, 0), (2, 1)]


def test_the_newest_info_event_replaces_the_older_whichever_comes_first(clockwork: Clockwork) -> None:
    old, new, other = an_event(13194, NOW - 1), an_event(13194, NOW), an_event(13194, NOW, BOB)
    for event in (new, other, old):
        clockwork.relay.take(event)
    assert clockwork.kept(authors=[public_key(ALICE)]) == [new]
    same = [an_event(13194, NOW, content=text) for text in "abc"]
    for event in same:
        clockwork.relay.take(event)
    assert clockwork.kept(authors=[public_key(ALICE)]) == [min([new, *same], key=lambda event: event.id)]
    assert len(clockwork.kept()) == 2


def test_addressable_events_have_a_place_for_each_d_tag(clockwork: Clockwork) -> None:
    for event in (an_event(30000, NOW - 1, d="a"), an_event(30000, NOW, d="a"), an_event(30000, NOW, d="b")):
        clockwork.relay.take(event)
    assert sorted((event.tag("d"), event.created_at) for event in clockwork.kept()) == [("a", NOW), ("b", NOW)]


def test_a_request_is_kept_for_a_short_while_only(clockwork: Clockwork) -> None:
    request, note = an_event(23194), an_event(1)
    for event in (request, note):
        clockwork.relay.take(event)
    clockwork.now += EPHEMERAL_SECONDS - 1
    assert len(clockwork.kept()) == 2
    clockwork.now += 1
    assert clockwork.kept() == [note]


def test_what_expires_is_forgotten_and_not_taken_again(clockwork: Clockwork) -> None:
    event = an_event(1, expiration=str(NOW + 10))
    clockwork.relay.take(event)
    clockwork.now += 10
    assert clockwork.kept() == []
    with pytest.raises(Refused, match="expired"):
        clockwork.relay.take(event)


def test_an_event_from_the_future_is_refused(clockwork: Clockwork) -> None:
    with pytest.raises(Refused, match="future"):
        clockwork.relay.take(an_event(at=NOW + 901))


def test_the_same_event_twice_is_told_once(clockwork: Clockwork) -> None:
    clockwork.visitor.hear('["REQ", "s", {"kinds": [1]}]')
    event = an_event(1)
    for _ in range(2):
        clockwork.visitor.hear(f'["EVENT", {as_json(event)}]')
    assert [message[0] for message in clockwork.said] == ["EOSE", "EVENT", "OK", "OK"]
    assert clockwork.said[2][3] == ""
    assert clockwork.said[3][2:] == [True, "duplicate: it is known"]


def test_a_visitor_who_left_is_told_nothing(clockwork: Clockwork) -> None:
    clockwork.visitor.hear('["REQ", "s", {}]')
    clockwork.visitor.leave()
    clockwork.relay.take(an_event(1))
    assert [message[0] for message in clockwork.said] == ["EOSE"]


def test_memory_has_an_end() -> None:
    relay = Relay(lambda: NOW, max_kept=3)
    events = [an_event(1, NOW + number) for number in range(5)]
    for event in events:
        relay.take(event)
    assert relay.stored([read_filter({})]) == events[:1:-1]


@pytest.mark.parametrize(
    "broken",
    [{"id": "A" * 64}, {"id": "0" * 64 + "\n"}, {"kind": -1}, {"kind": 70000}, {"tags": [[1]]}, {"sig": "00" * 63},
     {"created_at": -1}, {"content": None}, {"pubkey": "zz" * 32}],
)  # fmt: skip
def test_a_malformed_event_is_no_event(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        read_event(json.loads(as_json(an_event())) | broken)


def test_an_author_that_is_no_point_is_refused() -> None:
    nobody = "ff" * 32
    fields = json.loads(as_json(an_event())) | {"pubkey": nobody}
    fields["id"] = event_id(nobody, NOW, 1, (), "x")
    with pytest.raises(ValueError, match="signature"):
        read_event(fields)
