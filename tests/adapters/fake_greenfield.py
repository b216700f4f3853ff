"""A Greenfield server of a few lines that behaves: it keeps invoices, lists them, and can be told to misbehave."""

import asyncio
import json
from collections import deque
from typing import Any

import httpx

from app.adapters.asking import Patience
from app.adapters.btcpay import BtcpayGateway

BASE_URL = "https://btcpay.example"
STORE = "Store1"
API_KEY = "key-that-must-stay-secret"
SECRET = "webhook-secret-that-must-stay-secret"
CREATED = 1_795_189_000


def an_invoice(invoice_id: str = "Inv1", **changes: Any) -> dict[str, Any]:
    """An invoice as GET invoice answers it."""
    return {
        "id": invoice_id,
        "storeId": STORE,
        "amount": "5.00",
        "paidAmount": "0.00",
        "currency": "USD",
        "type": "Standard",
        "checkoutLink": f"{BASE_URL}/i/{invoice_id}",
        "createdTime": CREATED,
        "expirationTime": CREATED + 900,
        "monitoringExpiration": CREATED + 90_000,
        "status": "New",
        "additionalStatus": "None",
        "archived": False,
        "metadata": {"orderId": "order-1"},
        "checkout": {"speedPolicy": "MediumSpeed", "paymentMethods": ["BTC-LN"]},
        **changes,
    }


def a_method(method_id: str = "BTC-LN", **changes: Any) -> dict[str, Any]:
    """One element of what GET payment-methods answers."""
    return {
        "paymentMethodId": method_id,
        "currency": method_id.partition("-")[0],
        "destination": "lnbc50u1example",
        "paymentLink": "lightning:lnbc50u1example",
        "rate": "100000.00",
        "paymentMethodPaid": "0",
        "totalPaid": "0",
        "due": "0.00005",
        "amount": "0.00005",
        "paymentMethodFee": "0",
        "payments": [],
        "activated": True,
        "additionalData": {},
        **changes,
    }


def a_payment(payment_id: str = "hash-1", **changes: Any) -> dict[str, Any]:
    return {
        "id": payment_id,
        "receivedDate": CREATED + 10,
        "value": "0.00005",
        "fee": "0",
        "status": "Settled",
        "destination": "lnbc50u1example",
        **changes,
    }


def problem(status: int, code: str, message: str = "no", **more: str) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "message": message, **more})


class FakeGreenfield:
    """Answers from `invoices` (newest last) and `methods`; `next_answers` come first, whatever is asked.

    An element of `next_answers` is a response to give, an exception to raise, or a number of seconds to hang.
    """

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.next_answers: deque[httpx.Response | Exception | float] = deque()
        self.invoices: list[dict[str, Any]] = []
        self.methods: dict[str, list[dict[str, Any]]] = {}
        self.rates: Any = [{"currencyPair": "BTC_USD", "errors": [], "rate": "64392.23"}]
        self.synchronized = True
        self.includes_methods = True
        self.page_limit = 1000

    def add(self, invoice: dict[str, Any], *methods: dict[str, Any]) -> None:
        self.invoices.append(invoice)
        self.methods[invoice["id"]] = list(methods)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.next_answers:
            answer = self.next_answers.popleft()
            if isinstance(answer, httpx.Response):
                return answer
            if isinstance(answer, Exception):
                raise answer
            await asyncio.sleep(answer)
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/v1/health":
            return httpx.Response(200, json={"synchronized": self.synchronized})
        if request.headers.get("authorization") != f"token {API_KEY}":
            return problem(401, "unauthenticated")
        match request.url.path.split("/"):
            case ["", "api", "v1", "stores", store, *_] if store != STORE:
                return problem(404, "store-not-found")
            case [_, _, _, _, _, "rates"]:
                return httpx.Response(200, json=self.rates)
            case [_, _, _, _, _, "invoices"] if request.method == "POST":
                return self._create(json.loads(request.content))
            case [_, _, _, _, _, "invoices"]:
                return self._list(request.url.params)
            case [_, _, _, _, _, "invoices", invoice_id, *rest]:
                return self._one(invoice_id, bool(rest))
        return httpx.Response(404, text="no such route")

    def _create(self, asked: dict[str, Any]) -> httpx.Response:
        invoice_id = f"Inv{len(self.invoices) + 1}"
        invoice = an_invoice(invoice_id, **{key: asked[key] for key in ("amount", "currency", "metadata", "checkout")})
        self.add(invoice, *(a_method(method_id) for method_id in asked["checkout"]["paymentMethods"]))
        return httpx.Response(200, json=invoice)

    def _list(self, query: httpx.QueryParams) -> httpx.Response:
        orders = query.get_list("orderId")
        found = [
            one
            for one in reversed(self.invoices)
            if (not orders or one["metadata"].get("orderId") in orders)
            and one["createdTime"] >= int(query.get("startDate", "0"))
        ]
        skip, take = int(query.get("skip", "0")), min(self.page_limit, int(query.get("take", "1000")))
        if self.includes_methods and query.get("includePaymentMethods") == "true":
            found = [{**one, "paymentMethods": self.methods[one["id"]]} for one in found]
        return httpx.Response(200, json=found[skip : skip + take])

    def _one(self, invoice_id: str, wants_methods: bool) -> httpx.Response:
        invoice = next((one for one in self.invoices if one["id"] == invoice_id), None)
        if invoice is None:
            return problem(404, "invoice-not-found", "The invoice was not found")
        return httpx.Response(200, json=self.methods[invoice_id] if wants_methods else invoice)


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def a_gateway(fake: FakeGreenfield, clock: Clock | None = None, **settings: Any) -> BtcpayGateway:
    """A gateway on the fake, which never waits between tries."""
    values: dict[str, Any] = {
        "base_url": BASE_URL,
        "api_key": API_KEY,
        "store_id": STORE,
        "webhook_secret": SECRET,
        "patience": Patience(backoff_seconds=0),
        "client": httpx.AsyncClient(transport=httpx.MockTransport(fake)),
        "monotonic": clock or Clock(),
    }
    return BtcpayGateway(**{**values, **settings})
