"""Versions in the database: one active at a time, compared before, loaded once, and never rewritten."""

import asyncio
import uuid
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, rows
from app.kernel.errors import InvalidField, ModelNotPriced
from app.pricing import catalogue as catalogues
from app.pricing import rules
from app.pricing.catalogue import (
    Catalogues,
    Diff,
    NoActiveVersion,
    PriceDropTooLarge,
    activate,
    compared,
    diff,
    load,
    store,
)
from app.pricing.quote import Ask, Call, Catalogue
from app.pricing.rows import MEDIA, PPM, Dimension, PriceRow, Usage
from app.pricing.starter import ensure_starter, starter
from app.wiring import House

D = Dimension
NOW = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)
ONE_TOKEN = Usage(input_tokens=1000)


def price(price_pusd: int, model: str = "m", since: datetime = NOW - DAY) -> PriceRow:
    return PriceRow(model, "p", D.INPUT, price_pusd, effective_from=since)


def line(dimension: Dimension, price_pusd: int, attributes: str = "", tier_min: int = 0) -> PriceRow:
    return PriceRow("m", "p", dimension, price_pusd, tier_min, attributes)


async def a_version(db: Database, *prices: PriceRow) -> int:
    return await db.transaction(lambda session: store(session, prices, (), source="test", source_hash="0"))


async def make_active(db: Database, version_id: int, *, allow_drops: bool = False) -> None:
    await db.transaction(lambda session: activate(session, version_id, allow_drops=allow_drops, notice_seconds=0))


async def override(db: Database, price_pusd: int) -> uuid.UUID:
    return await db.transaction(lambda session: rules.set_override(session, "m", D.INPUT, price_pusd, notice_seconds=0))


async def an_active_version(db: Database, *prices: PriceRow) -> int:
    version_id = await a_version(db, *prices)
    await make_active(db, version_id, allow_drops=True)
    return version_id


def cost_nusd(book: Catalogue, model: str = "m", account: str = "", now: datetime | None = None) -> int:
    return book.price(Call(model, account=account), ONE_TOKEN, now or datetime.now(UTC)).cost_nusd


class Clock:
    """Seconds that pass when the test says so."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


async def test_nothing_is_sold_before_a_version_is_active(unpriced: House) -> None:
    await a_version(unpriced.db, price(1000))
    with pytest.raises(NoActiveVersion) as refused:
        await Catalogues().current(unpriced.db)
    assert isinstance(refused.value, ModelNotPriced)


async def test_a_stored_version_prices_as_its_rows_did(unpriced: House) -> None:
    draft = starter()
    version_id = await unpriced.db.transaction(
        lambda session: store(session, draft.prices, draft.models, source="test", source_hash="0")
    )
    loaded = await unpriced.db.transaction(lambda session: load(session, version_id))
    direct = Catalogue(version_id, draft.prices, models=draft.models)
    for model in direct.models():
        assert list(loaded.listed(model, loaded.providers_of(model)[0], NOW)) == list(
            direct.listed(model, direct.providers_of(model)[0], NOW)
        )


async def test_activating_retires_the_one_before_and_an_older_one_may_come_back(unpriced: House) -> None:
    first = await an_active_version(unpriced.db, price(1000))
    second = await an_active_version(unpriced.db, price(1100))
    states = await unpriced.db.transaction(
        lambda session: rows(session, "SELECT id, state FROM price_version ORDER BY id")
    )
    assert [(row["id"], row["state"]) for row in states] == [(first, "retired"), (second, "active")]
    await unpriced.db.transaction(lambda session: activate(session, first, notice_seconds=0))
    assert cost_nusd(await Catalogues().current(unpriced.db)) == 1000


async def test_racing_activations_leave_exactly_one_active(unpriced: House) -> None:
    ids = [await a_version(unpriced.db, price(1000 + place)) for place in range(6)]
    await asyncio.gather(*(make_active(unpriced.db, each) for each in ids))
    active = await unpriced.db.transaction(lambda s: rows(s, "SELECT id FROM price_version WHERE state = 'active'"))
    assert len(active) == 1


async def test_racing_imports_get_versions_of_their_own(unpriced: House) -> None:
    ids = await asyncio.gather(*(a_version(unpriced.db, price(1000)) for _ in range(6)))
    assert sorted(ids) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("new_pusd", "is_refused"), [(499, True), (500, False), (5000, False)])
async def test_a_drop_of_more_than_half_is_refused_unless_told(
    unpriced: House, new_pusd: int, is_refused: bool
) -> None:
    await an_active_version(unpriced.db, price(1000))
    version_id = await a_version(unpriced.db, price(new_pusd))
    if is_refused:
        with pytest.raises(PriceDropTooLarge, match="m input"):
            await unpriced.db.transaction(lambda session: activate(session, version_id))
    await unpriced.db.transaction(
        lambda session: activate(session, version_id, allow_drops=is_refused, notice_seconds=0)
    )
    assert cost_nusd(await Catalogues().current(unpriced.db)) == new_pusd


async def test_a_drop_that_only_begins_later_is_seen_too(unpriced: House) -> None:
    await an_active_version(unpriced.db, price(1000))
    later = datetime.now(UTC) + DAY
    version_id = await a_version(unpriced.db, price(1000), price(1, since=later))
    with pytest.raises(PriceDropTooLarge):
        await unpriced.db.transaction(lambda session: activate(session, version_id))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([line(D.OUTPUT, 1), line(D.OUTPUT, 100, tier_min=100_001)], [line(D.OUTPUT, 1)]),
        ([line(D.OUTPUT, 100)], [line(D.OUTPUT, 100), line(D.OUTPUT, 1, tier_min=100_001)]),
        ([line(D.IMAGES, 1), line(D.IMAGES, 100, "quality=hd")], [line(D.IMAGES, 1)]),
        ([line(D.IMAGES, 100)], [line(D.IMAGES, 100), line(D.IMAGES, 1, "quality=hd")]),
        ([line(D.INPUT, 1), line(D.CACHE_WRITE_5M, 100)], [line(D.INPUT, 1)]),
        ([line(D.INPUT, 100)], [line(D.INPUT, 100), line(D.CACHE_READ, 1)]),
        ([line(D.OUTPUT, 1), line(D.REASONING, 100)], [line(D.OUTPUT, 1)]),
        ([line(D.OUTPUT, 1), line(D.REQUESTS, 100)], [line(D.OUTPUT, 1)]),
    ],
)
async def test_a_drop_is_seen_where_a_line_comes_or_goes_beside_another(
    unpriced: House, old: list[PriceRow], new: list[PriceRow]
) -> None:
    await an_active_version(unpriced.db, *old)
    with pytest.raises(PriceDropTooLarge):
        await make_active(unpriced.db, await a_version(unpriced.db, *new))


async def test_models_that_would_be_sold_no_more_must_be_allowed_by_name(unpriced: House) -> None:
    first = await an_active_version(unpriced.db, price(1000), *(price(1000, f"old-{place}") for place in range(50)))
    version_id = await a_version(unpriced.db, price(1000))
    with pytest.raises(PriceDropTooLarge, match="50 prices of 50 models are gone, such as of old-0"):
        await make_active(unpriced.db, version_id)
    await make_active(unpriced.db, version_id, allow_drops=True)
    await make_active(unpriced.db, first)


def test_a_model_that_will_be_gone_later_and_a_line_that_says_nothing_new_are_told_apart() -> None:
    ends = PriceRow("m", "p", D.INPUT, 1000, effective_to=NOW + DAY)
    (gone,) = compared([price(1000)], [ends], NOW).removed
    assert gone.since == NOW + DAY
    again = compared([line(D.INPUT, 7)], [line(D.INPUT, 7), line(D.INPUT, 7, "service_tier=flex")], NOW)
    assert again == Diff((), (), ())


async def test_a_version_without_prices_or_unknown_is_not_activated(unpriced: House) -> None:
    empty = await a_version(unpriced.db)
    for version_id in (empty, 99):
        with pytest.raises(InvalidField, match=str(version_id)):
            await make_active(unpriced.db, version_id)


def test_a_diff_names_what_is_new_gone_and_changed_and_by_how_much() -> None:
    old = [price(1000, "same"), price(1000, "up"), price(1000, "gone"), price(0, "was-free")]
    new = [price(1000, "same"), price(1125, "up"), price(5, "new"), price(7, "was-free")]
    found = compared(old, new, NOW)
    assert [(change.key[0], change.percent) for change in found.added] == [("new", "new")]
    assert [change.key[0] for change in found.removed] == ["gone"]
    assert {change.key[0]: change.percent for change in found.changed} == {"up": "12.5", "was-free": "was free"}


async def test_a_version_is_loaded_once_and_the_active_one_asked_for_at_most_every_second(unpriced: House) -> None:
    await an_active_version(unpriced.db, price(1000))
    clock = Clock()
    known = Catalogues(clock)
    found = await asyncio.gather(*(known.current(unpriced.db) for _ in range(20)))
    assert len(set(map(id, found))) == 1
    await an_active_version(unpriced.db, price(2000))
    assert cost_nusd(await known.current(unpriced.db)) == 1000
    clock.seconds += 1
    assert cost_nusd(await known.current(unpriced.db)) == 2000
    assert (await known.at(unpriced.db, 1)) is found[0]


async def test_the_loop_goes_on_while_a_catalogue_is_built() -> None:
    version = {"id": 1, "revision": 0, "created_at": NOW}
    found = [asdict(price(1000, f"m{place}")) for place in range(2000)]
    building, turns = asyncio.ensure_future(catalogues.build(version, found)), 0
    while not building.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 2
    assert cost_nusd(building.result(), "m1999") == 1000


async def test_a_call_that_began_under_an_older_version_is_priced_by_it(unpriced: House) -> None:
    first = await an_active_version(unpriced.db, price(1000))
    await an_active_version(unpriced.db, price(2000))
    draft = await a_version(unpriced.db, price(3000))
    known = Catalogues()
    assert cost_nusd(await known.at(unpriced.db, first)) == 1000
    with pytest.raises(InvalidField):
        await known.at(unpriced.db, draft)


async def test_overrides_markups_and_fees_reach_every_process_and_leave_the_past_as_it_was(unpriced: House) -> None:
    await an_active_version(unpriced.db, price(1000))
    clock = Clock()
    known = Catalogues(clock)
    assert cost_nusd(await known.current(unpriced.db)) == 1000
    before = datetime.now(UTC)

    async def change(session: AsyncSession) -> None:
        await rules.set_override(session, "m", D.INPUT, 3000, notice_seconds=0)
        await rules.set_markup(session, "account", "a", multiplier_ppm=2 * PPM, notice_seconds=0)
        await rules.set_fee(session, "web", 20_000_000, notice_seconds=0)

    await unpriced.db.transaction(change)
    clock.seconds += 1
    book = await known.current(unpriced.db)
    assert (cost_nusd(book), cost_nusd(book, account="a")) == (3000, 6000)
    assert cost_nusd(book, account="a", now=before) == 1000
    assert book.fees(datetime.now(UTC)) == {"web": 20_000_000}


async def test_a_rule_replaces_the_one_of_its_name_and_can_be_ended(unpriced: House) -> None:
    await an_active_version(unpriced.db, price(1000))
    await override(unpriced.db, 2000)
    override_id = await override(unpriced.db, 3000)
    assert cost_nusd(await Catalogues().current(unpriced.db)) == 3000
    assert await unpriced.db.transaction(
        lambda session: rules.end(session, "price_override", override_id, notice_seconds=0)
    )
    assert not await unpriced.db.transaction(
        lambda session: rules.end(session, "price_override", override_id, notice_seconds=0)
    )
    assert cost_nusd(await Catalogues().current(unpriced.db)) == 1000


async def test_no_rule_begins_in_the_past(unpriced: House) -> None:
    with pytest.raises(InvalidField, match="past"):
        await unpriced.db.transaction(lambda s: rules.set_fee(s, "web", 1, effective_from=NOW - 1000 * DAY))


async def test_the_runtime_role_adds_and_ends_prices_and_never_rewrites_them(unpriced: House, clean: str) -> None:
    await an_active_version(unpriced.db, price(1000))
    with psycopg.connect(clean, autocommit=True, options="-c role=satmeter_runtime") as conn:
        for statement in (
            "UPDATE price SET price_pusd = 0", "DELETE FROM price", "UPDATE price_version SET source = 'x'",
            "UPDATE price_override SET price_pusd = 0", "UPDATE markup SET multiplier_ppm = 0", "DELETE FROM fee",
            "UPDATE priced_model SET mode = 'x'",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())


async def test_the_starter_is_version_one_once_and_only_where_there_is_no_version(unpriced: House) -> None:
    made = await asyncio.gather(*(ensure_starter(unpriced.db) for _ in range(4)))
    assert sorted(made) == [False, False, False, True]
    book = await Catalogues().current(unpriced.db)
    assert (book.version_id, book.fees(datetime.now(UTC))) == (1, {"web": 20_000_000})
    assert (await unpriced.db.transaction(lambda session: diff(session, 1, 1))).changed == ()


@pytest.mark.parametrize(
    ("call", "usage", "cost_usd_nano"),
    [
        (Call("openai/gpt-4o-mini"), Usage(input_tokens=1_000_000, output_tokens=1_000_000), 750_000_000),
        (Call("claude-3-haiku"), Usage(input_tokens=1_000_000, cache_read_tokens=1_000_000), 30_000_000),
        (Call("claude-sonnet-4-5"), Usage(input_tokens=200_001), 1_200_006_000),
        (Call("openai/tts-1"), Usage(characters=1000), 15_000_000),
        (Call("openai/whisper-1"), Usage(audio_seconds=60), 6_000_000),
        (Call("nova-3"), Usage(audio_seconds=60), 4_300_000),
        (Call("deepgram_aura_2"), Usage(characters=1000), 30_000_000),
        (Call("openai/dall-e-3", attributes={"size": "1024x1024"}), Usage(images=1), 40_000_000),
        (Call("gpt-image-1", attributes={"quality": "medium"}), Usage(images=1), 80_500_000),
        (Call("flux-2-pro", attributes={"quality": "2k", "size": "16:9"}), Usage(images=1), 75_000_000),
        (Call("veo3"), Usage(video_seconds=8), 3_200_000_000),
        (Call("sora-2-pro", attributes={"quality": "1080p"}), Usage(video_seconds=10), 5_000_000_000),
        (Call("kling-2.1-pro"), Usage(video_seconds=5), 287_500_000),
    ],
)
def test_the_starter_prices_what_the_documents_name(call: Call, usage: Usage, cost_usd_nano: int) -> None:
    draft = starter()
    book = Catalogue(1, draft.prices, models=draft.models)
    assert book.price(call, usage, NOW).cost_nusd == cost_usd_nano


NAMED = [
    "gpt-4o",
    "gpt-4o-mini",
    "openai/gpt-4o",
    "openai/gpt-4o-mini",
    "gpt-4-turbo",
    "gpt-3.5-turbo",
    "claude-3-haiku",
    "claude-3.5-sonnet",
    "claude-sonnet-4-5",
    "claude-sonnet-4-6",
    "gemini-2.5-pro",
    "mistral-large-latest",
    "mistral-small-latest",
    "codestral-latest",
    "llama-3.1-8b",
    "pureai/gemma-3-4b-it",
    "pureai/DeepSeek-R1-Distill-Llama-8B",
    "text-embedding-3-small",
    "openai/tts-1",
    "openai/whisper-1",
    "openai/dall-e-3",
    "nova-3",
    "nova-2",
    "deepgram_aura_2",
    "gpt-image-1",
    "gpt-image-1.5",
    "nano-banana-pro",
    "flux-2-pro",
    "flux-2-flex",
    "flux-2-pro-i2i",
    "flux-kontext-pro",
    "flux-kontext-max",
    "veo3",
    "veo3-fast",
    "sora-2",
    "sora-2-pro",
    "kling-2.1-pro",
    "kling-2.1-master",
    "kling-2.5-turbo",
    "runway-gen4",
    "runway-aleph",
    "veo3-i2v",
    "sora-2-i2v",
    "sora-2-pro-i2v",
    "kling-2.1-master-i2v",
    "kling-2.5-turbo-i2v",
]


@pytest.mark.parametrize("name", NAMED)
def test_every_model_that_the_documents_name_can_be_held_for(name: str) -> None:
    draft = starter()
    book = Catalogue(1, draft.prices, models=draft.models)
    model, provider = book.resolved(name)
    media = [dimension for dimension, *_ in book.listed(model, provider, NOW) if dimension in MEDIA]
    usage = Usage(**{media[0].value: 1}) if media else Usage(input_tokens=1000)
    assert book.estimate(Ask(Call(name), usage), NOW).cost_nusd > 0


@pytest.mark.parametrize("name", NAMED)
def test_no_model_that_the_documents_name_is_held_for_nothing(name: str) -> None:
    draft = starter()
    book = Catalogue(1, draft.prices, models=draft.models)
    try:
        held_nusd = book.estimate(Ask(Call(name)), NOW).cost_nusd
    except (InvalidField, ModelNotPriced):
        return
    assert held_nusd > 0


def test_the_default_limit_of_a_drop_is_half() -> None:
    assert catalogues.MAX_DROP_PERCENT == 50


def test_a_model_is_known_by_its_own_name_and_after_its_sellers_and_by_nothing_near_it() -> None:
    rows_ = [
        PriceRow("m", "openai", D.INPUT, 1), PriceRow("two", "dear", D.INPUT, 2), PriceRow("two", "cheap", D.INPUT, 1),
        PriceRow("azure/m", "azure", D.INPUT, 1), PriceRow("own", "p", D.INPUT, 1), PriceRow("p/own", "p", D.INPUT, 9),
        PriceRow("free", "", D.INPUT, 1),
    ]  # fmt: skip
    book = Catalogue(1, rows_)
    names = {
        "m": ("m", "openai/m"), "openai/m": ("openai/m", "m"), "two": ("two", "dear/two"), "dear/two": ("dear/two", "two"),
        "cheap/two": ("cheap/two",), "azure/m": ("azure/m", "azure/azure/m"), "azure/azure/m": ("azure/azure/m", "azure/m"),
        "own": ("own",), "p/own": ("p/own", "p/p/own"), "free": ("free",), "/free": ("/free",), "x": ("x",), "": ("",),
    }  # fmt: skip
    assert {model: catalogues.names_of(book, model) for model in names} == names
    for near in (
        "M",
        "OpenAI/m",
        "openai//m",
        "openai/m ",
        " m",
        "m/",
        "openai/M",
        "other/m",
        "openai/openai/m",
        "m-2024-07-18",
    ):
        assert catalogues.names_of(book, near) == (near,)
    for model, known in names.items():
        for name in known:  # what is taken for the model is what the catalogue charges for it
            if book.is_known(model):
                assert book.resolved(name) == book.resolved(model)


@pytest.mark.parametrize("model", ["m", "two", "own", "azure/m", "gone", "openai/m", "only", ""])
@pytest.mark.parametrize("provider", ["", "openai", "azure", "cheap", "p", "nobody"])
def test_a_model_of_a_provider_is_known_exactly_where_it_has_a_price(model: str, provider: str) -> None:
    book = Catalogue(1, [
        PriceRow("m", "openai", D.INPUT, 1), PriceRow("two", "cheap", D.INPUT, 1), PriceRow("azure/m", "azure", D.INPUT, 1),
        PriceRow("own", "p", D.INPUT, 1), PriceRow("p/only", "p", D.INPUT, 9),
    ])  # fmt: skip
    try:
        book.resolved(model, provider)
        is_priced = True
    except ModelNotPriced:
        is_priced = False
    assert book.is_known(model, provider) == is_priced
    assert (model, provider) != ("only", "p") or is_priced, "known by its provider's name alone"
