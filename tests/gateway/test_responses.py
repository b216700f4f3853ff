"""Responses by OpenAI's SDK: charged, told, and shown to the account whose they are alone."""

from decimal import Decimal
from typing import Any

import openai
import pytest

from tests.gateway.street import NUSD, Street, pieces

MINI = "gpt-4o-mini"


async def test_a_response_tells_what_it_cost(street: Street) -> None:
    answer = await street.openai().responses.create(model=MINI, input="Hello", max_output_tokens=30)
    assert answer.output_text
    charge = await street.only_charge()
    assert Decimal(str(answer.usage.total_cost_usd)) * NUSD == charge["cost_nusd"] > 0


async def test_a_streamed_response_tells_it_when_it_is_complete(street: Street) -> None:
    events = await pieces(await street.openai().responses.create(model=MINI, input="Hello", stream=True))
    assert events[-1].type == "response.completed"
    charge = await street.only_charge()
    assert Decimal(str(events[-1].response.usage.total_cost_usd)) * NUSD == charge["cost_nusd"] > 0


async def test_a_response_is_its_accounts_own(street: Street) -> None:
    client = street.openai()
    answer: Any = await client.responses.create(model=MINI, input="Hello")
    assert (await client.responses.retrieve(answer.id)).id == answer.id
    await client.responses.create(model=MINI, input="More", previous_response_id=answer.id)
    other = street.openai(api_key=(await street.rig.customer("10")).api_key)
    with pytest.raises(openai.NotFoundError):
        await other.responses.retrieve(answer.id)
    with pytest.raises(openai.NotFoundError):
        await other.responses.create(model=MINI, input="More", previous_response_id=answer.id)
    assert len(await street.charges()) == 2


async def test_what_would_be_answered_after_it_was_charged_is_refused(street: Street) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await street.openai().responses.create(model=MINI, input="Hello", background=True)
    assert refused.value.param == "background"


async def test_a_response_that_breaks_off_is_charged_for_what_came(street: Street) -> None:
    await street.order("cut=12, tokens=40, pace=0.01")
    events = await pieces(await street.openai().responses.create(model=MINI, input="Hello", stream=True))
    assert (events[-1].type, events[-1].code) == ("error", "upstream_error")
    charge = await street.only_charge()
    assert (charge["outcome"], charge["flags"]) == ("partial", "usage_estimated")
    assert 0 < charge["units"]["output_tokens"] < 40
