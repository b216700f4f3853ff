"""Clients that exist, replayed as they ask: PayPerQ's, Routstr's reader of it, and both OpenAI SDKs."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from app.kernel.settings import Settings
from app.pricing.catalogue import activate, store
from app.pricing.kinds import context_tokens, kind_of
from app.pricing.quote import DEFAULT_OUTPUT_TOKENS, Catalogue
from app.pricing.rows import Dimension, ModelRow, PriceRow
from app.pricing.starter import ensure_starter
from tests.door import JSON, Door, opened, refusal_faults


@pytest.fixture
async def door(clean: str, settings: Settings) -> AsyncIterator[Door]:
    async with opened(clean, settings) as door:
        await ensure_starter(door.rig.house.db)
        yield door


async def models(door: Door, path: str = "/v1/models") -> dict[str, Any]:
    answer = await door.ask("GET", path)
    assert answer.status == 200, answer.body
    return {model["id"]: model for model in answer.json["data"]}


# --- models --------------------------------------------------------------------------------------------


class PricingOfPayPerQ(msgspec.Struct):
    """What Routstr's reader takes of a model, strictly: a model with less is left out."""

    input_per_1M_tokens: float
    output_per_1M_tokens: float


class ModelOfPayPerQ(msgspec.Struct):
    id: str
    name: str
    created_at: int
    context_length: int
    pricing: PricingOfPayPerQ
    provider: str | None = None
    popular: bool = False


@pytest.mark.parametrize("path", ["/models", "/v1/models", "/router/models"])
async def test_routstrs_reader_takes_every_chat_model(door: Door, path: str) -> None:
    answer = await door.ask("GET", path, {"Authorization": "Bearer sk-whatever"})
    taken = [msgspec.convert(model, ModelOfPayPerQ, strict=True) for model in answer.json["data"]]
    assert len(taken) == 22
    [mini] = [model for model in taken if model.id == "gpt-4o-mini"]
    assert (mini.pricing.input_per_1M_tokens, mini.pricing.output_per_1M_tokens, mini.context_length) == (0.15, 0.6, 128_000)  # fmt: skip
    assert mini.created_at // 1000 > 1_700_000_000
    assert b'"input_per_1M_tokens":0.15,' in answer.body


async def test_a_bare_list_is_chat_models_and_a_type_asks_for_others(door: Door) -> None:
    every = await models(door, "/v1/models?type=all")
    assert len(every) == 53
    by_type = {kind: set(await models(door, f"/v1/models?type={kind}")) for kind in ("chat", "image", "video", "audio", "embedding")}  # fmt: skip
    assert by_type["chat"] == set(await models(door)) == set(await models(door, "/models"))
    assert "dall-e-3" in by_type["image"]
    assert "veo3" in by_type["video"]
    assert {"tts-1", "whisper-1"} <= by_type["audio"]
    assert by_type["embedding"] == {"text-embedding-3-small", "text-embedding-3-large"}
    assert sum(map(len, by_type.values())) == len(set().union(*by_type.values())) == 53
    for asked, kinds in (("image,video", ("image", "video")), ("chat, embedding", ("chat", "embedding")), ("IMAGE", ("image",)), ("all,chat", tuple(by_type))):  # fmt: skip
        assert set(await models(door, f"/models?type={quote(asked)}")) == set().union(*(by_type[kind] for kind in kinds))  # fmt: skip
    assert {model["type"] for model in every.values()} == set(by_type)
    assert set(await models(door, "/v1/media/models")) == by_type["image"] | by_type["video"] | by_type["audio"]
    assert set(await models(door, "/v1/media/models?type=video")) == by_type["video"]
    assert set(await models(door, "/v1/models?model=dall-e-3")) == {"dall-e-3"}, "who names a model is given it"
    assert set(await models(door, "/v1/models?model=dall-e-3&type=chat")) == set()


@pytest.mark.parametrize("query", ["type=text", "type=", "type=chat,", "type=chat,sound", "type=null", "tpye=image", "type=chat&type=image"])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/models", "/router/models", "/v1/media/models"])
async def test_a_type_that_there_is_not_is_422(door: Door, path: str, query: str) -> None:
    answer = await door.ask("GET", f"{path}?{query}")
    assert not refusal_faults(answer, 422, "invalid_field", ())
    assert answer.json["error"]["param"] == query.partition("=")[0]


async def _with_slashes(door: Door) -> None:
    """Models named as routers and price files name them."""
    names = (
        "deepseek-ai/DeepSeek-V3",
        "accounts/fireworks/models/llama-v3",
        "meta/llama:free",
        "a model",
        "50%25",
        "café",
    )

    async def work(session: Any) -> None:
        prices = [PriceRow(name, "together", Dimension.OUTPUT, 5) for name in names]
        rows = [ModelRow(name, "together", "chat") for name in names]
        await activate(session, await store(session, prices, rows, source="t", source_hash="h"), allow_drops=True, notice_seconds=0)  # fmt: skip

    await door.rig.house.db.transaction(work)


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/api/v1/models"])
async def test_models_retrieve_of_both_openai_sdks(door: Door, path: str) -> None:
    """Python's sends a slash as it is or, newer ones, percent-encoded; JavaScript's encodes it."""
    for spelled in ("gpt-4o", "openai/gpt-4o", "openai%2Fgpt-4o", "openai%2fgpt-4o"):
        answer = await door.ask("GET", f"{path}/{spelled}", {"Authorization": "Bearer sk-x"})
        assert (answer.status, answer.json["id"], answer.json["object"]) == (200, "gpt-4o", "model"), spelled
        assert isinstance(answer.json["created"], int)
        assert answer.json["owned_by"] == "openai"
    assert (await door.ask("GET", f"{path}/dall-e-3")).status == 200, "of whatever type"
    await _with_slashes(door)
    for name in await models(door, "/v1/models?type=all"):
        for spelled in (quote(name), quote(name, safe="")):
            answer = await door.ask("GET", f"{path}/{spelled}")
            assert (answer.status, answer.json.get("id")) == (200, name), spelled
    for name in ("nope", "gpt-4o/more", "openai", "%00", "a%0Ab", "x" * 5000, "null"):
        answer = await door.ask("GET", f"{path}/{name}")
        assert not refusal_faults(answer, 404, "not_found", ())
        assert answer.json["error"]["param"] == "model"


async def test_the_openrouter_list_has_prices_as_texts_and_text_models_alone(door: Door) -> None:
    listed = await models(door, "/api/v1/models")
    assert set(listed) == set(await models(door))
    mini = listed["gpt-4o-mini"]
    assert mini["pricing"] == {"prompt": "0.00000015", "completion": "0.0000006", "input_cache_read": "0.000000075"}
    assert (mini["context_length"], mini["top_provider"]["max_completion_tokens"]) == (128_000, 16_384)
    assert mini["architecture"]["output_modalities"] == ["text"]
    assert set(await models(door, "/api/v1/models?output_modalities=all")) == set(await models(door, "/v1/models?type=all"))  # fmt: skip
    images = await models(door, "/api/v1/models?output_modalities=image")
    assert set(images) == set(await models(door, "/v1/models?type=image"))
    assert (await door.ask("GET", "/api/v1/models?output_modalities=smell")).json["error"]["code"] == 422
    assert (await models(door, "/api/v1/models?output_modalities=audio"))["whisper-1"]["architecture"]["modality"] == "audio->text"  # fmt: skip


def test_a_kind_is_told_by_the_word_of_a_price_file_or_by_what_is_sold() -> None:
    for mode, kind in (("chat", "chat"), ("responses", "chat"), ("completion", "chat"), ("image_edit", "image"), ("audio_transcription", "audio"), ("rerank", "other")):  # fmt: skip
        assert kind_of(mode, {"output"}) == kind
    for priced, kind in ((("input", "output"), "chat"), (("input",), "embedding"), (("input", "images"), "image"), (("video_seconds", "output"), "video"), (("characters",), "audio"), (("input", "image_output"), "image"), (("queries",), "other")):  # fmt: skip
        assert kind_of("", set(priced)) == kind


def test_a_chat_model_has_a_context_also_where_its_price_file_does_not_say() -> None:
    def told(*rows: ModelRow, kind: str = "chat") -> int | None:
        prices = [PriceRow(row.model, row.provider, Dimension.OUTPUT, 5) for row in rows]
        return context_tokens(Catalogue(1, prices, models=rows), rows[0].model, rows[0].provider, kind)

    assert told(ModelRow("m", "a", "chat", 4096, 128_000)) == 128_000
    others = (ModelRow("m", "b", "chat", None, 64_000), ModelRow("m", "c", "chat", None, 32_000))
    assert told(ModelRow("m", "a", "chat", 4096), *others) == 32_000, "what some provider of it takes"
    assert told(ModelRow("m", "a", "chat", 4096)) == 4096, "it takes its longest answer at least"
    assert told(ModelRow("m", "a", "chat")) == DEFAULT_OUTPUT_TOKENS, "what a call of it is held for"
    assert told(ModelRow("m", "a", "image_generation"), kind="image") is None


# --- accounts and top-ups --------------------------------------------------------------------------------


async def test_a_client_that_makes_a_credit_id_is_told_that_it_is_ours_to_make(door: Door) -> None:
    """RUNSTR's first step."""
    mine = str(uuid.uuid4())
    for credit_id in (mine, mine.upper(), "not-a-uuid", ""):
        answer = await door.ask("POST", "/credits/check-or-create", JSON, json.dumps({"credit_id": credit_id}).encode())
        assert not refusal_faults(answer, 404, "not_found", ())
        assert "/accounts/create" in answer.json["message"]
        assert not mine or mine not in answer.body.decode()
    assert door.rig.sql("SELECT count(*) FROM account") == [(0,)]
    customer = await door.customer()
    for credit_id in (customer.credit_id, customer.credit_id.upper()):
        body = json.dumps({"credit_id": credit_id, "device": "phone"}).encode()
        answer = await door.ask("POST", "/credits/check-or-create", JSON, body)
        assert answer.json == {"credit_id": customer.credit_id, "success": True, "created": False}
    missing = await door.ask("POST", "/credits/check-or-create", JSON, b"{}")
    assert (missing.status, missing.json["error"]["param"]) == (422, "credit_id")


async def test_the_case_of_a_currency_does_not_matter(door: Door) -> None:
    customer = await door.customer()
    told = []
    for spelled in ("sats", "Sats", "SATS"):
        body = json.dumps({"amount": 1000, "currency": spelled, "credit_id": customer.credit_id}).encode()
        answer = await door.ask("POST", "/topup/create/btc-lightning", customer.key | JSON, body)
        assert (answer.status, answer.json["currency"]) == (201, "SATS")
        told.append(answer.json["invoice_id"])
    assert len(set(told)) == 1, "the same wish within a minute"
    for method, spelled, amount in (("btc", "usd", 20), ("btc", "btc", "0.001"), ("ltc", "Ltc", 1), ("xmr", "xmr", 1), ("lbtc", "lbtc", "0.001")):  # fmt: skip
        body = json.dumps({"amount": amount, "currency": spelled}).encode()
        answer = await door.ask("POST", f"/topup/create/{method}", customer.key | JSON, body)
        assert (answer.status, answer.json.get("currency")) == (201, spelled.upper()), answer.body
    odd = await door.ask("POST", "/topup/create/btc-lightning", customer.key | JSON, '{"amount": 1000, "currency": "ſats"}'.encode())  # fmt: skip
    assert odd.code == "unsupported_currency", "a letter that has S for its capital is none"


async def test_the_documents_say_the_idempotency_key_of_a_new_account_once(door: Door) -> None:
    contract = (await door.ask("GET", "/openapi.json")).json
    [header] = [one for one in contract["paths"]["/accounts/create"]["post"]["parameters"] if one["name"] == "Idempotency-Key"]  # fmt: skip
    assert "16-255" in header["description"]
    assert "1-255" not in header["description"].replace("16-255", "")
    assert "16,255" in header["schema"]["pattern"]
    [other] = [one for one in contract["paths"]["/keys"]["post"]["parameters"] if one["name"] == "Idempotency-Key"]
    assert "1-255" in other["description"]
