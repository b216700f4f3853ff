"""Anthropic's messages and the counting of their tokens: row 6. They go to who speaks them natively; nothing is converted."""

from typing import Any, Final

import msgspec

from app.client import Denied
from app.gateway import asking
from app.gateway.answering import Wire
from app.gateway.asking import NotSent, Silent, refusal_of
from app.gateway.call import Ask, Gateway, unknown
from app.gateway.errors import InvalidField, PluginUnavailable, Refusal, Told
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import must_have, must_have_messages, text_of
from app.gateway.inference import counting, estimate_of, flag_of, infer, limit_of, limited, sent_on, word_of
from app.gateway.models import refuse_incomplete
from app.gateway.paths import EMPTY_BALANCE
from app.gateway.upstreams import Target
from app.gateway.websearch import own_searches, paying_for_own, results_asked

_PROMPT: Final = ("messages", "system", "tools")
_LIMITS: Final = ("max_tokens",)
_WEB_SEARCH: Final = {"type": "web_search_20250305", "name": "web_search"}
"""Source: Anthropic docs, "Web search tool"."""


async def messages(gateway: Gateway, exchange: Exchange) -> None:
    """POST /v1/messages."""
    body = _with_own_search(gateway, await exchange.json())
    model, most = text_of(body, "model"), limit_of(body, _LIMITS)
    flag_of(body, "stream")
    await refuse_incomplete(gateway, model, lambda: must_have_messages(body))
    await refuse_incomplete(gateway, model, lambda: must_have(body, "max_tokens"))

    def sent(target: Target, granted: int | None) -> bytes:
        changed: dict[str, Any] = limited(body, _LIMITS, granted, "max_tokens")
        return sent_on(body, model=target.upstream_model, **changed)

    ask = Ask(
        model=model, row="messages", path="messages" + _beta(exchange), body=sent,
        estimate=estimate_of(body, _PROMPT, most), prompt_tokens=counting(body, _PROMPT, model),
        provider=word_of(body, "provider"), asks_output=most,
    )  # fmt: skip
    searches, size = own_searches(body)
    if searches:
        ask = await paying_for_own(gateway, ask, searches, size)
    await infer(gateway, exchange, ask, Wire.ANTHROPIC)


def _with_own_search(gateway: Gateway, body: Body) -> Body:
    """With the web plugin as Anthropic's own tool. Raises InvalidField, PluginUnavailable."""
    if not results_asked(body):
        return body
    targets = gateway.settings.upstreams.targets(text_of(body, "model"), "messages", word_of(body, "provider"))
    if targets and targets[0].upstream.web_search != "anthropic":
        raise PluginUnavailable("This model cannot search by itself; /v1/chat/completions can", param="plugins")
    try:
        tools = msgspec.json.decode(body.get("tools", b"null"), type=list[msgspec.Raw] | None) or []
    except msgspec.DecodeError:
        raise InvalidField("tools is a list", param="tools") from None
    return body | {"tools": msgspec.Raw(msgspec.json.encode([*tools, _WEB_SEARCH]))}


async def count_tokens(gateway: Gateway, exchange: Exchange) -> None:
    """POST /v1/messages/count_tokens: free, for a key with money behind it."""
    body = await exchange.json()
    model = text_of(body, "model")
    await refuse_incomplete(gateway, model, lambda: must_have_messages(body))
    verdict = await gateway.meter.verify(exchange.shown(), model=model)
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
