"""OpenAI's responses: row 4. Each is its account's own: nobody reads, or goes on from, what another was answered."""

from typing import Any, Final

from app.client import Denied, Verified
from app.gateway import asking
from app.gateway.answering import Wire
from app.gateway.asking import NotSent, Silent, refusal_of
from app.gateway.call import Ask, Gateway
from app.gateway.errors import InvalidField, NothingThere, Told
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import number_of, text_of
from app.gateway.inference import counting, estimate_of, flag_of, infer, limit_of, limited, sent_on, texts_of, word_of
from app.gateway.upstreams import Target
from app.gateway.websearch import own_searches, paying_for_own

_PROMPT: Final = ("input", "instructions", "tools", "text", "prompt")
_LIMITS: Final = ("max_output_tokens",)


async def responses(gateway: Gateway, exchange: Exchange) -> None:
    """POST /v1/responses."""
    body = await exchange.json()
    ask, before = _ask(body), word_of(body, "previous_response_id")
    most, size = own_searches(body)
    if most:
        ask = await paying_for_own(gateway, ask, number_of(body, "max_tool_calls", most, 1, 1000), size)
    if before is not None:
        gateway.owners.of(before, (await _caller(gateway, exchange)).account_id)
    made = await infer(gateway, exchange, ask, Wire.RESPONSES)
    if made.upstream_id is not None and bytes(body.get("store", b"true")) != b"false":
        gateway.owners.note(made.upstream_id, made.account_id, made.upstream)


async def response(gateway: Gateway, exchange: Exchange) -> None:
    """GET /v1/responses/{id}: free, for the account whose it is."""
    id = exchange.path.rpartition("/")[2]
    kept = gateway.owners.of(id, (await _caller(gateway, exchange)).account_id)
    upstream = next((each for each in gateway.settings.upstreams.all if each.name == kept.upstream), None)
    if upstream is None:
        raise NothingThere(f"There is no response {id[:100]!r}")
    try:
        found = await asking.ask(
            gateway.session, Target("", upstream, ""), f"responses/{id}", None, exchange.headers, method="GET"
        )
    except (NotSent, Silent):
        raise asking.failed("The model's provider did not answer") from None
    if found.status >= 400:
        raise await refusal_of(found, upstream)
    await exchange.answer(found.status, await found.read())


def _ask(body: Body) -> Ask:
    """Raises InvalidField."""
    model, most = text_of(body, "model"), limit_of(body, _LIMITS)
    flag_of(body, "stream")
    if flag_of(body, "background"):
        raise InvalidField("background is not offered here: an answer is charged when it is given", param="background")

    def sent(target: Target, granted: int | None) -> bytes:
        changed: dict[str, Any] = limited(body, _LIMITS, granted, "max_output_tokens")
        return sent_on(body, model=target.upstream_model, **changed)

    return Ask(
        model=model, row="responses", path="responses", estimate=estimate_of(body, _PROMPT, most), body=sent,
        prompt_tokens=counting(body, _PROMPT, model), fallbacks=texts_of(body, "fallbacks"),
        provider=word_of(body, "provider"), asks_output=most,
    )  # fmt: skip


async def _caller(gateway: Gateway, exchange: Exchange) -> Verified:
    """Raises Told."""
    verdict = await gateway.meter.verify(exchange.shown())
    if isinstance(verdict, Denied):
        raise Told(verdict, gateway.settings.low_balance_status)
    return verdict
