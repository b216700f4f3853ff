"""Anthropic's messages and the counting of their tokens: row 6. They go to who speaks them natively; nothing is converted."""

from typing import Any, Final

from app.client import Denied
from app.gateway import asking
from app.gateway.answering import Wire
from app.gateway.asking import NotSent, Silent, refusal_of
from app.gateway.call import Ask, Gateway, unknown
from app.gateway.errors import Refusal, Told
from app.gateway.exchange import Exchange
from app.gateway.fields import text_of
from app.gateway.inference import counting, estimate_of, flag_of, infer, limit_of, limited, sent_on, word_of
from app.gateway.paths import EMPTY_BALANCE
from app.gateway.upstreams import Target

_PROMPT: Final = ("messages", "system", "tools")
_LIMITS: Final = ("max_tokens",)


async def messages(gateway: Gateway, exchange: Exchange) -> None:
    """POST /v1/messages."""
    body = await exchange.json()
    model, most = text_of(body, "model"), limit_of(body, _LIMITS)
    flag_of(body, "stream")

    def sent(target: Target, granted: int | None) -> bytes:
        changed: dict[str, Any] = limited(body, _LIMITS, granted, "max_tokens")
        return sent_on(body, model=target.upstream_model, **changed)

    ask = Ask(
        model=model, row="messages", path="messages" + _beta(exchange), body=sent,
        estimate=estimate_of(body, _PROMPT, most), prompt_tokens=counting(body, _PROMPT, model),
        provider=word_of(body, "provider"), asks_output=most,
    )  # fmt: skip
    await infer(gateway, exchange, ask, Wire.ANTHROPIC)


async def count_tokens(gateway: Gateway, exchange: Exchange) -> None:
    """POST /v1/messages/count_tokens: free, for a key with money behind it."""
    body = await exchange.json()
    model = text_of(body, "model")
    verdict = await gateway.meter.verify(exchange.api_key(), model=model)
    if isinstance(verdict, Denied):
        raise Told(verdict, gateway.settings.low_balance_status)
    if verdict.available_usd <= 0:
        raise Told(EMPTY_BALANCE, gateway.settings.low_balance_status)
    targets = gateway.settings.upstreams.targets(model, "messages", word_of(body, "provider"))
    refusal: Refusal = unknown(model)
    for target in targets:
        try:
            sent = sent_on(body, model=target.upstream_model)
            path = "messages/count_tokens" + _beta(exchange)
            response = await asking.ask(gateway.session, target, path, sent, exchange.headers)
        except (NotSent, Silent):
            refusal = asking.failed("The model's provider did not answer")
            continue
        if response.status < 400:
            counted = await response.read()
            await exchange.answer(response.status, counted)
            return
        refusal = await refusal_of(response, target.upstream)
    raise refusal


def _beta(exchange: Exchange) -> str:
    """The only thing that Anthropic's SDKs say in a query."""
    return "?beta=true" if exchange.query.get("beta") == "true" else ""
