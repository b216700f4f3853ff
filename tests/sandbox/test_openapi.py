"""Every answer against BTCPay's own OpenAPI file, which lies beside this checkout."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from openapi_schema_validator import OAS30Validator

from .conftest import INVOICES, STORE, Shop

OPENAPI = Path(__file__).parents[2].parent / "shared" / "data" / "btcpay-greenfield-2.4.1.openapi.json"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    if not OPENAPI.exists():
        pytest.skip("btcpay-greenfield-2.4.1.openapi.json is not beside this checkout")
    return dict(json.loads(OPENAPI.read_text()))


def flat(schema: Any, document: dict[str, Any]) -> Any:
    """The schema with references put in place and `allOf` merged.

    The file says `additionalProperties: false` in several branches of one `allOf`, which taken literally refuses
    everything; merged, it refuses what none of the branches knows.
    """
    if isinstance(schema, list):
        return [flat(part, document) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return flat(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], document)
    merged: dict[str, Any] = {}
    for part in flat(schema.get("allOf", []), document):
        merged = {**merged, **part, "properties": {**merged.get("properties", {}), **part.get("properties", {})}}
    own = {key: flat(value, document) for key, value in schema.items() if key != "allOf"}
    properties = {**merged.pop("properties", {}), **own.pop("properties", {})}
    return {**merged, **own, **({"properties": properties} if properties else {})}


def answer_schema(document: dict[str, Any], path: str, method: str = "get") -> Any:
    content = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]
    return flat(copy.deepcopy(content["schema"]), document)


def check(answer: Any, schema: Any) -> None:
    problems = [f"{list(error.absolute_path)}: {error.message}" for error in OAS30Validator(schema).iter_errors(answer)]
    assert problems == []


def test_the_check_can_fail(document: dict[str, Any]) -> None:
    schema = answer_schema(document, "/api/v1/invoices/{invoiceId}")
    assert OAS30Validator(schema).is_valid({"id": "x", "status": "New"})
    for wrong in ({"id": 5}, {"status": "Paid"}, {"amount": 5}, {"surprise": True}):
        assert not OAS30Validator(schema).is_valid(wrong)


@pytest.mark.parametrize("method", ["BTC-LN", "BTC-CHAIN", "LTC-CHAIN", "LBTC-CHAIN", "XMR-CHAIN", None])
async def test_invoices_and_their_methods_in_every_state(
    shop: Shop, document: dict[str, Any], method: str | None
) -> None:
    one = answer_schema(document, "/api/v1/stores/{storeId}/invoices/{invoiceId}")
    many = answer_schema(document, "/api/v1/stores/{storeId}/invoices")
    ways = answer_schema(document, "/api/v1/stores/{storeId}/invoices/{invoiceId}/payment-methods")
    created = await shop.create(method)
    check(created, answer_schema(document, "/api/v1/stores/{storeId}/invoices", "post"))
    id = created["id"]
    for act, body in (("pay", {"amount": "0.0001"}), ("pay", {}), ("confirm", {"blocks": 10}), ("pay", {})):
        await shop.drive(id, act, **body)
        check(await shop.get(id), one)
        check(await shop.methods(id), ways)
        check((await shop.api("GET", f"{INVOICES}?includePaymentMethods=true")).json(), many)
    marked = await shop.api("POST", f"{INVOICES}/{(await shop.create())['id']}/status", json={"status": "Invalid"})
    check(marked.json(), answer_schema(document, "/api/v1/invoices/{invoiceId}/status", "post"))


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/api/v1/stores", "/api/v1/stores"),
        (f"/api/v1/stores/{STORE}", "/api/v1/stores/{storeId}"),
        (f"/api/v1/stores/{STORE}/payment-methods", "/api/v1/stores/{storeId}/payment-methods"),
        (
            f"/api/v1/stores/{STORE}/payment-methods/BTC-LN",
            "/api/v1/stores/{storeId}/payment-methods/{paymentMethodId}",
        ),
        (f"/api/v1/stores/{STORE}/rates?currencyPair=BTC_USD", "/api/v1/stores/{storeId}/rates"),
        (f"/api/v1/stores/{STORE}/webhooks", "/api/v1/stores/{storeId}/webhooks"),
        ("/api/v1/health", "/api/v1/health"),
        ("/api/v1/api-keys/current", "/api/v1/api-keys/current"),
    ],
)
async def test_the_store_and_the_server(shop: Shop, document: dict[str, Any], path: str, template: str) -> None:
    answer = await shop.api("GET", path)
    assert answer.status_code == 200
    check(answer.json(), answer_schema(document, template))


async def test_the_server_info_but_for_its_onion(shop: Shop, document: dict[str, Any]) -> None:
    """The file says `onion` is a string; the code answers null where there is no Tor."""
    info = (await shop.api("GET", "/api/v1/server/info")).json()
    assert info.pop("onion") is None
    check(info, answer_schema(document, "/api/v1/server/info"))


async def test_webhooks_and_deliveries(shop: Shop, document: dict[str, Any]) -> None:
    shop.receiver.answers = [500, 404]
    await shop.create()
    await shop.all_told()
    base = f"/api/v1/stores/{STORE}/webhooks"
    created = (await shop.api("POST", base, json={"url": "http://x.test/"})).json()
    check(created, answer_schema(document, "/api/v1/stores/{storeId}/webhooks", "post"))
    first = (await shop.api("GET", base)).json()[0]["id"]
    check((await shop.api("GET", f"{base}/{first}")).json(), answer_schema(document, "/api/v1/webhooks/{webhookId}"))
    rows = (await shop.api("GET", f"{base}/{first}/deliveries")).json()
    assert len(rows) == 2
    for row in rows:
        row["errorMessage"] = row["errorMessage"] or ""  # null in the code where there was no error
    check(rows, answer_schema(document, "/api/v1/webhooks/{webhookId}/deliveries"))


async def test_webhook_bodies(shop: Shop, document: dict[str, Any]) -> None:
    await shop.drive((await shop.create())["id"], "pay")
    await shop.drive((await shop.create())["id"], "expire")
    await shop.all_told()
    for body in shop.receiver.bodies:
        schema = document["x-webhooks"][body["type"]]["post"]["requestBody"]["content"]["application/json"]["schema"]
        check(body, flat(copy.deepcopy(schema), document))


async def test_errors(shop: Shop, document: dict[str, Any]) -> None:
    problem = flat({"$ref": "#/components/schemas/ProblemDetails"}, document)
    problems = flat({"$ref": "#/components/schemas/ValidationProblemDetails"}, document)
    check((await shop.client.get(INVOICES)).json(), problem)
    check((await shop.api("GET", f"{INVOICES}/nothing")).json(), problem)
    check((await shop.api("POST", INVOICES, json={"amount": "x"})).json(), problems)
