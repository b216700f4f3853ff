"""Speech: a text to be said, charged by its characters, streamed to its caller as it comes."""

import asyncio
from typing import Final

import aiohttp

from app.client import Estimate, Usage
from app.client.telling import Outcome
from app.gateway import asking
from app.gateway.costs import usd_text
from app.gateway.exchange import Exchange, Interrupted
from app.gateway.fields import text_of
from app.gateway.inference import sent_on
from app.gateway.paid import Gateway, Paid, targets_of
from app.gateway.upstreams import Target

MOST_CHARACTERS: Final = 2_000
DEFAULT_MODEL: Final = "deepgram_aura_2"
_VOICES: Final = {"deepgram": "aura-2-arcas-en", "": "alloy"}
_NUSD: Final = 10**9


async def speech(gateway: Gateway, exchange: Exchange) -> None:
    """POST /audio/speech."""
    body = await exchange.json()
    model = text_of(body, "model", DEFAULT_MODEL)
    said = text_of(body, "input", most=MOST_CHARACTERS)
    voice = text_of(body, "voice", default_voice(model))
    targets = targets_of(gateway, model, "speech")
    paid = await Paid.held(gateway, exchange, targets[0], exchange.path, Estimate(characters=len(said)))

    async def ask(target: Target) -> aiohttp.ClientResponse:
        sent = sent_on(body, model=target.upstream_model, voice=voice)
        return await asking.ask(gateway.session, target, "audio/speech", sent, exchange.headers)

    response = await paid.answer(targets, ask)
    try:
        await _said(exchange, response, paid, len(said))
    finally:
        response.close()


def default_voice(model: str) -> str:
    """The voice of a model for which none is named."""
    return next(voice for start, voice in _VOICES.items() if model.rpartition("/")[2].startswith(start))


async def _said(exchange: Exchange, response: aiohttp.ClientResponse, paid: Paid, characters: int) -> None:
    """Send the recording on, and charge the text as soon as any of it came: nothing tells how much of it that was."""
    charge: asyncio.Future[Outcome] | None = None
    cost = {"x-satmeter-cost-usd": usd_text(int(paid.estimated_usd * _NUSD))}
    try:
        async for chunk in response.content.iter_any():
            if charge is None:
                charge = paid.charge(Usage(characters=characters), upstream_id=response.headers.get("x-request-id"))
                await exchange.start(200, asking.answer_headers(response) | cost)
            await exchange.write(chunk)
    except (aiohttp.ClientError, TimeoutError, OSError):
        if charge is None:
            paid.unused("the provider ended before it began", may_have_run=True)
            raise asking.failed("The model's provider ended its answer before it began") from None
        raise Interrupted from None
    if charge is None:
        paid.unused("the provider said nothing", may_have_run=True)
        raise asking.failed("The model's provider sent an empty recording")
    await exchange.end()
