"""How a proxy talks to Satmeter: ask before a call, tell afterwards, and lose nothing in between.

It imports nothing of the service, knows it by its wire alone, and needs only msgspec and httpx.

    async with Meter(url, token, spool=Path("spool")) as meter:
        verdict = await meter.authorize(key, model="gpt-4o-mini", estimate=Estimate(input_tokens=100))
        if isinstance(verdict, Denied):          # Unavailable too, where Satmeter is away
            return respond(verdict.status, verdict.headers, verdict.body())
        meter.forwarded(verdict)                 # the upstream is called: from here on it is never free
        ...
        meter.settle(verdict, Done(usage=...))   # returns at once; told in the background
"""

from app.client.asked import Asked, asked_of
from app.client.meter import Meter
from app.client.metered import key_of, metered
from app.client.shown import Shown
from app.client.transport import Answer, AnswerLost, HttpxTransport, NotReached, Transport
from app.client.usage import Answer as PassingAnswer
from app.client.usage import usage_of
from app.client.wire import (
    Allowed,
    Attributes,
    Charged,
    Cost,
    Denied,
    Done,
    Estimate,
    Extended,
    Hold,
    OnExpiry,
    Outcome,
    PriceOfCall,
    Refunded,
    Refused,
    Unavailable,
    Usage,
    Verified,
)

__all__ = [
    "Allowed",
    "Answer",
    "AnswerLost",
    "Asked",
    "Attributes",
    "Charged",
    "Cost",
    "Denied",
    "Done",
    "Estimate",
    "Extended",
    "Hold",
    "HttpxTransport",
    "Meter",
    "NotReached",
    "OnExpiry",
    "Outcome",
    "PassingAnswer",
    "PriceOfCall",
    "Refunded",
    "Refused",
    "Shown",
    "Transport",
    "Unavailable",
    "Usage",
    "Verified",
    "asked_of",
    "key_of",
    "metered",
    "usage_of",
]
