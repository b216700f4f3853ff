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

from app.client.meter import Meter
from app.client.transport import Answer, AnswerLost, HttpxTransport, NotReached, Transport
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
    Refused,
    Unavailable,
    Usage,
    Verified,
)

__all__ = [
    "Allowed",
    "Answer",
    "AnswerLost",
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
    "PriceOfCall",
    "Refused",
    "Transport",
    "Unavailable",
    "Usage",
    "Verified",
]
