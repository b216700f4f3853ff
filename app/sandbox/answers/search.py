"""Search: results that nobody wrote, in the form of Exa's API, for a gateway that brings its own search.

Source: Exa docs, "Search".
"""

from typing import Any

from .orders import Order
from .usage import Counts
from .wire import Answer, Call, json_answer
from .words import length_of, pieces


def answer_search(call: Call, order: Order) -> Answer:
    query = str(call.fields.get("query") or "")
    n = call.fields.get("numResults")
    count = n if isinstance(n, int) and not isinstance(n, bool) and 0 < n <= 100 else 10
    body = {
        "requestId": f"{len(query):08x}", "resolvedSearchType": "neural",
        "results": [_result(query, place) for place in range(count)],
        "costDollars": {"total": 0.005, "search": {"neural": 0.005}},
    }  # fmt: skip
    return json_answer(body, counts=Counts(queries=1))


def _result(query: str, place: int) -> dict[str, Any]:
    seed = f"{query}#{place}"
    return {
        "id": f"https://sandbox.invalid/{place}", "url": f"https://sandbox.invalid/{place}",
        "title": f"A page that the sandbox made up, {place + 1}", "publishedDate": "2026-01-01T00:00:00.000Z",
        "author": "nobody", "text": "".join(pieces(seed, length_of(seed))),
    }  # fmt: skip
