"""What the service tells about itself is true: the contract against the running app, and the pages against the contract."""

import ast
import enum
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from html import escape
from typing import Any, Literal

import httpx
import msgspec
import pytest
from httpx import Response
from litestar import Litestar, get, post, route
from litestar.params import FromPath, JSONBody
from litestar.routes import HTTPRoute
from openapi_schema_validator import OAS31Validator

import app.serve  # noqa: F401 - its errors are in the contract, as they are wherever we serve
from app.admin.tokens import create_token
from app.docs import Contract
from app.docs.contract import callers, operations
from app.docs.guides import GUIDES, Step
from app.docs.page import reference_page
from app.docs.schema import every_error
from app.docs.words import BODIES, FIELDS, NAMES, REFUSALS, VERDICTS
from app.kernel.money import JsonNumber
from app.main import create_app
from tests.rig import Customer, Rig
from tests.wallets import NWC_URL

ANYBODY = ["API key", "credit id"]


async def _contract(rig: Rig) -> Any:
    response = await rig.client.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    return response.json()


def _inside(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _inside(child)


def _at(contract: Any, ref: str) -> Any:
    found = contract
    for step in ref.removeprefix("#/").split("/"):
        found = found[step]
    return found


def _faults(contract: Any, schema: Any, value: Any) -> list[str]:
    whole = {"$defs": contract["components"]["schemas"], "allOf": [schema]}
    moved = _moved(whole)
    return [f"{list(error.path)}: {error.message}" for error in OAS31Validator(moved).iter_errors(value)]


def _moved(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            name: child.replace("#/components/schemas/", "#/$defs/")
            if name == "$ref" and isinstance(child, str)
            else _moved(child)
            for name, child in node.items()
        }
    return [_moved(child) for child in node] if isinstance(node, list) else node


def _assert_as_documented(contract: Any, response: Response) -> None:
    """The answer has a documented status, and the documented shape."""
    path, method = response.request.url.path, response.request.method
    known = [
        (len(template.split("{")), item[method.lower()])
        for template, item in contract["paths"].items()
        if method.lower() in item and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)
    ]
    operation = min(known, key=lambda one: one[0])[1]
    documented = operation["responses"].get(str(response.status_code))
    assert documented is not None, f"{method} {path} answered {response.status_code}: {response.text}"
    assert _faults(contract, documented["content"]["application/json"]["schema"], response.json()) == []
    if response.status_code >= 400:
        error = response.json()["error"]
        assert (error["metadata"]["error_code"] if path.startswith("/api/v1/") else error["code"]) in documented[
            "x-codes"
        ]


async def test_the_contract_holds_together(rig: Rig) -> None:
    contract = await _contract(rig)
    assert contract["openapi"].startswith("3.1")
    for node in _inside(contract):
        if "$ref" in node:
            assert _at(contract, node["$ref"])
    for name, schema in contract["components"]["schemas"].items():
        OAS31Validator.check_schema(schema)
        assert set(schema["required"]) <= set(schema["properties"]), name
    for path, _, operation in operations(contract):
        in_path = [one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"]
        assert sorted(in_path) == sorted(re.findall(r"\{(\w+)\}", path))
        for scheme in (name for one in operation["security"] for name in one):
            assert scheme in contract["components"]["securitySchemes"]


async def test_the_contract_has_every_public_route_of_the_app(rig: Rig) -> None:
    contract = await _contract(rig)
    routes = {
        (re.sub(r":\w+", "", route.path), method)
        for route in create_app(rig.house).routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        if handler.resolve_include_in_schema()
        for method in handler.http_methods
        if method != "OPTIONS"
    }
    assert {(path, method) for path, method, _ in operations(contract)} == routes
    assert {f"{method} {path}" for path, method in routes} >= set(NAMES), "NAMES has a route that is gone"


async def test_operation_ids_are_short_unique_and_stay(rig: Rig) -> None:
    contract = await _contract(rig)
    ids = [operation["operationId"] for _, _, operation in operations(contract)]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z]+([A-Z][a-z]+){1,4}", name)] == []
    assert {"createAccount", "createTopup", "readTopup", "createKey", "listKeys", "authorizeCall", "settleCall"} <= set(
        ids
    )
    gone = {*REFUSALS, *VERDICTS, *BODIES} - {*ids, *_names(contract)}
    assert gone == set(), "an operation or field that is gone still has its refusals"


async def test_every_operation_says_who_may_call_it_what_it_means_and_how_it_refuses(rig: Rig) -> None:
    contract = await _contract(rig)
    for path, method, operation in operations(contract):
        assert operation["summary"], (path, method)
        assert operation["description"], (path, method)
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], f"{method} {path}: say in FIELDS what {parameter['name']} is"
        for status, response in operation["responses"].items():
            assert response["headers"]["X-Request-Id"]
            if "x-codes" in response:
                body = "OpenRouterError" if path.startswith("/api/v1/") else "Error"
                assert response["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{body}"}
                assert all(every_error()[code].status == int(status) for code in response["x-codes"])
            if status in ("429", "503") and "x-codes" in response:
                assert response["headers"]["Retry-After"]
    who = {f"{method} {path}": callers(operation) for path, method, operation in operations(contract)}
    assert who["POST /accounts/create"] == who["GET /health/live"] == ["no credential"]
    assert who["POST /topup/create/{method}"] == who["POST /credits/balance"] == ANYBODY
    assert who["POST /keys"] == ["credit id", "API key"], "a key may make others below it"
    assert who["GET /nwc-auto-topup"] == ["credit id"]
    assert who["POST /v1/meter/settle"] == ["service token"]
    assert who["GET /v1/meter/ext-authz"] == ["service token", "API key"]
    assert who["GET /admin/topups"] == ["admin token"]


async def test_only_what_has_its_effect_once_offers_an_idempotency_key(rig: Rig) -> None:
    offering = {
        operation["operationId"]
        for _, _, operation in operations(await _contract(rig))
        if any(one["name"] == "Idempotency-Key" for one in operation.get("parameters", ()))
    }
    assert {"createAccount", "createKey", "createTopup"} <= offering
    assert not offering & {"readTopup", "listKeys", "settleCall"}


async def test_every_error_code_is_in_the_contract_and_answered_by_something(rig: Rig) -> None:
    contract = await _contract(rig)
    codes = contract["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]
    assert codes == list(every_error())
    answered = {
        code
        for _, _, operation in operations(contract)
        for code in [*operation.get("x-verdicts", ()), *(c for one in operation["responses"].values() for c in one.get("x-codes", ()))]
    }  # fmt: skip
    of_any_request = {
        "method_not_allowed",
        "head_too_large",
        "malformed_request",
        "request_timeout",
        "too_many_connections",
    }
    assert set(codes) - answered == of_any_request, "put a new error into REFUSALS or VERDICTS"


async def test_every_field_says_what_it_means_and_no_word_is_left_over(rig: Rig) -> None:
    contract = await _contract(rig)
    schemas = contract["components"]["schemas"]
    silent = [f"{name}.{field}" for name, one in schemas.items() for field, it in one["properties"].items() if not it.get("description")]  # fmt: skip
    assert silent == [], "say in FIELDS what it means"
    assert set(FIELDS) - _all_fields(schemas) - _names(contract) == set(), "a field that is gone still has its words"


async def test_money_is_an_exact_decimal_and_null_only_where_it_can_be(rig: Rig) -> None:
    schemas = (await _contract(rig))["components"]["schemas"]
    money = {
        f"{name}.{field}": it
        for name, one in schemas.items()
        for field, it in one["properties"].items()
        if it.get("format") == "decimal"
    }
    assert money["BalanceView.balance"]["type"] == "number"
    assert money["TopupRequest.amount"]["type"] == ["number", "string"]
    assert money["KeyRequest.usage_limit_usd"]["type"] == ["number", "string", "null"]
    assert money["KeyView.usage_limit_usd"]["type"] == money["CostView.fees_usd"]["type"] == ["number", "null"]
    named = {key for key in _all_fields(schemas) if key.endswith("_usd")}
    assert named <= set(money)


def _names(contract: Any) -> set[str]:
    """Of every field and parameter, and of a parameter with its operation's."""
    parameters = {
        name
        for _, _, operation in operations(contract)
        for one in operation["parameters"]
        for name in (one["name"], f"{operation['operationId']}.{one['name']}")
    }
    return parameters | {field for one in contract["components"]["schemas"].values() for field in one["properties"]}


def _all_fields(schemas: Any) -> set[str]:
    return {f"{name}.{field}" for name, one in schemas.items() for field in one["properties"]}


async def test_every_example_body_is_one_that_its_own_schema_takes(rig: Rig) -> None:
    contract = await _contract(rig)
    for path, method, operation in operations(contract):
        if "requestBody" in operation:
            media = operation["requestBody"]["content"]["application/json"]
            relaxed = [fault for fault in _faults(contract, media["schema"], media["example"]) if "…" not in fault]
            assert relaxed == [], f"{method} {path}"


async def charge_id(rig: Rig, customer: Customer) -> str:
    """Of a new charge."""
    made = await rig.meter("charge", request_id="explained", api_key=customer.api_key, model="m", cost_usd="0.01")
    return str(made.json()["charge_id"])


async def test_what_the_app_answers_is_what_the_contract_says(rig: Rig) -> None:
    contract = await _contract(rig)
    ask, customer = rig.client, await rig.customer("10")
    admin = {"Authorization": f"Bearer {await create_token(rig.house.db, rig.house.settings.pepper, 'admin', 'ops')}"}
    invoice = await rig.topup(customer, "20")
    key = await rig.new_key(customer, usage_limit_usd="1.5", reset_period="daily", scopes=["spend"])
    hold = (await rig.authorize(customer.api_key, "1"))["hold_id"]
    answers = [
        await ask.post("/accounts/create"),
        await ask.get("/credits/balance", headers=customer.key),
        await ask.post("/credits/balance", json={"credit_id": customer.credit_id}),
        await ask.get("/credits/balance", headers={"Authorization": f"Bearer {key['api_key']}"}),
        await ask.get("/credits/balance"),
        await ask.get("/keys", headers=customer.owner),
        await ask.post("/keys", headers=customer.owner, json={"name": "k", "expire_at": "2999-01-01T00:00:00Z"}),
        await ask.post("/keys", headers=customer.owner, json={"name": "k"}),
        await ask.post("/keys", headers=customer.owner, content=b"{"),
        await ask.patch(f"/keys/{key['_id']}", headers=customer.owner, json={"usage_limit_usd": None}),
        await ask.get(f"/keys/{key['_id']}?show_key=true", headers=customer.owner),
        await ask.delete(f"/keys/{key['_id']}", headers=customer.owner),
        await ask.delete(f"/keys/{key['_id']}", headers=customer.owner),
        await ask.get("/topup/payment-methods"),
        await ask.post("/topup/create/btc-lightning", headers=customer.key, json={"amount": 1000, "currency": "SATS"}),
        await ask.post("/topup/create/btc", headers=customer.key, json={"amount": "0.01"}),
        await ask.post("/topup/create/gold", headers=customer.key, json={"amount": 5}),
        await ask.get(f"/topup/status/{invoice}", headers=customer.key),
        await ask.get("/topup/status/none", headers=customer.key),
        await ask.get(f"/topup/receipt/{invoice}", headers=customer.key),
        await ask.get("/topups", headers=customer.key),
        await ask.get("/topups?limit=0", headers=customer.key),
        await ask.post("/topup/claim", headers=customer.key, json={"txid": "0" * 64}),
        await rig.meter("authorize", request_id="a", api_key=customer.api_key, max_cost_usd=0.5),
        await rig.meter("authorize", request_id="a", api_key=customer.api_key, max_cost_usd=0.6),
        await rig.meter("authorize", request_id="b", api_key=customer.api_key, max_cost_usd=500),
        await rig.meter("settle", hold_id=hold, cost_usd=0.5, usage={"input_tokens": 5}),
        await rig.meter("release", hold_id=hold),
        await rig.meter("settle", hold_id="none", cost_usd=1),
        await rig.meter("charge", request_id="c", api_key=customer.api_key, cost_usd="0.25"),
        await rig.meter("charge", request_id="d", api_key="sk-none", cost_usd="0.25"),
        await ask.get("/queries/history", headers=customer.key),
        await ask.get("/queries/history?from=never", headers=customer.key),
        await ask.get("/activity", headers=customer.owner),
        await ask.get(f"/activity/{await charge_id(rig, customer)}/explain", headers=customer.key),
        await ask.get("/activity/none/explain", headers=customer.key),
        await ask.get("/api/v1/credits", headers=customer.owner),
        await ask.get("/api/v1/key", headers=customer.key),
        await ask.get("/api/v1/key", headers=customer.owner),
        await ask.get("/api/v1/auth/key", headers=customer.key),
        await ask.get("/api/v1/activity", headers=customer.key),
        await ask.get("/api/v1/activity?date=never", headers=customer.key),
        await ask.get(f"/api/v1/generation?id={await charge_id(rig, customer)}", headers=customer.key),
        await ask.get("/api/v1/generation?id=none", headers=customer.key),
        await ask.get("/api/v1/models"),
        await ask.get("/api/v1/models/none"),
        await ask.get("/v1/models/none"),
        await ask.get("/api/v1/keys", headers=customer.owner),
        made := await ask.post("/api/v1/keys", headers=customer.owner, json={"name": "theirs", "limit": 5}),
        await ask.post("/api/v1/keys", headers=customer.owner, json={"name": "theirs"}),
        await ask.get(f"/api/v1/keys/{made.json()['data']['hash']}", headers=customer.owner),
        await ask.patch(f"/api/v1/keys/{made.json()['data']['hash']}", headers=customer.owner, json={"limit": None}),
        await ask.delete(f"/api/v1/keys/{made.json()['data']['hash']}", headers=customer.owner),
        await ask.delete(f"/api/v1/keys/{made.json()['data']['hash']}", headers=customer.owner),
        await ask.post("/credits/check-or-create", json={"credit_id": customer.credit_id}),
        await ask.post("/credits/check-or-create", json={"credit_id": "none"}),
        await ask.get("/admin/topups", headers=admin),
        await ask.get("/admin/topups"),
        await ask.post("/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": NWC_URL}),
        await ask.post("/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": "x"}),
        await ask.get("/nwc-auto-topup", headers=customer.owner),
        await ask.get("/nwc-auto-topup/attempts", headers=customer.owner),
        await ask.delete("/nwc-auto-topup/connection", headers=customer.owner),
        await ask.delete("/nwc-auto-topup/connection", headers=customer.owner),
        await ask.get("/nwc-auto-topup", headers=customer.owner),
        await ask.get("/health/live"),
        await ask.get("/health/ready"),
        await ask.post("/webhooks/btcpay", content=b"{}"),
    ]
    for answer in answers:
        assert answer.status_code < 500
        _assert_as_documented(contract, answer)
    assert {answer.status_code for answer in answers} >= {200, 201, 400, 401, 403, 404, 409, 422}


async def test_the_pages_load_nothing_from_elsewhere_and_mention_every_path_and_code(rig: Rig) -> None:
    contract, page = await _contract(rig), await rig.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for path, _, operation in operations(contract):
        assert f"<code>{path}</code>" in page.text
        assert f'id="{operation["operationId"]}"' in page.text
    for code in every_error():
        assert f'id="error-{code}"' in page.text
    assert sorted(set(re.findall(r'href="?#([\w-]+)', page.text)) - set(re.findall(r'id="?([\w-]+)', page.text))) == []
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert set(re.findall(r"<(?:link|script|img|iframe)\b([^>]*)>", page.text)) <= {"", ' rel=icon href="data:,"'}
    assert re.findall(r"@import|url\(", page.text) == []


_STEPS = [(guide.id, step) for guide in GUIDES for step in guide.steps if step.code.startswith("curl ")]


@pytest.mark.parametrize(("guide", "step"), _STEPS, ids=[f"{guide}: {step.title}" for guide, step in _STEPS])
async def test_every_command_of_a_guide_is_one_that_the_contract_takes(rig: Rig, guide: str, step: Step) -> None:
    contract = await _contract(rig)
    words = shlex.split(step.code)
    [url] = [word for word in words if word.startswith("$BASE/")]
    path, _, query = url.removeprefix("$BASE").partition("?")
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    fitting = [
        (template.count("{"), operation)
        for template, found, operation in operations(contract)
        if found == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)
    ]
    if not fitting:
        assert (await rig.client.get(path)).status_code == 200
        return
    operation = min(fitting, key=lambda one: one[0])[1]
    assert {pair.partition("=")[0] for pair in query.split("&") if pair} <= {
        one["name"] for one in operation["parameters"]
    }
    sent = {word.partition(":")[0].lower() for word in words if re.match(r"[\w-]+: ", word)}
    for caller in callers(operation):
        if caller == "service token":
            assert sent & {"authorization", "x-service-token"}
    if callers(operation) != ["no credential"]:
        assert sent & {"authorization", "x-credit-id", "x-api-key"}
    if "-d" in words:
        body = json.loads(words[words.index("-d") + 1])
        assert _faults(contract, operation["requestBody"]["content"]["application/json"]["schema"], body) == []
    assert "-d" in words or not operation.get("requestBody", {}).get("required")


async def test_the_guide_for_agents_tells_how_to_pay_a_refusal_and_every_tool_of_the_mcp_server() -> None:
    pytest.importorskip("mcp")
    from app.agents.server import make_server
    from app.agents.wire import Account

    [guide] = [each for each in GUIDES if each.id == "guide-agents"]
    told = " ".join(step.code + step.after for step in guide.steps)
    tools = await make_server(Account("http://127.0.0.1", None, "sk-x"), allow_spend=True).list_tools()
    for words in (
        "WWW-Authenticate",
        "L402",
        "Payment",
        "metadata.offer",
        "X-Topup-Offer",
        "satmeter mcp",
        *(f"`{one.name}`" for one in tools),
    ):
        assert words in told, words
    [others] = [
        [step.code for step in each.steps if not step.code.startswith("curl ")] for each in GUIDES if each is guide
    ]
    assert others == ['pip install "satmeter[mcp]"\nSATMETER_URL=$BASE SATMETER_API_KEY=$API_KEY satmeter mcp']


async def test_the_guides_stand_before_the_reference(rig: Rig) -> None:
    page = (await rig.client.get("/docs")).text
    places = [page.index(f"id={guide.id}>") for guide in GUIDES]
    assert places == sorted(places)
    assert places[-1] < page.index("<h2>Reference</h2>") < page.index('id="createAccount"')
    assert "$BASE" not in page


async def test_every_operation_is_shown_in_a_shell_in_python_and_in_javascript(rig: Rig) -> None:
    contract, page = await _contract(rig), (await rig.client.get("/docs")).text
    for path, _, operation in operations(contract):
        samples = {one["lang"]: one["source"] for one in operation["x-codeSamples"]}
        assert list(samples) == ["Shell", "Python", "JavaScript"]
        ast.parse(samples["Python"])
        start = contract["servers"][0]["url"] + path.partition("{")[0]
        assert all(start in one for one in samples.values())
        assert all(escape(one) in page for one in samples.values())
    node = shutil.which("node")
    if node is not None:
        scripts = [
            f"async()=>{{{operation['x-codeSamples'][2]['source']}}}" for _, _, operation in operations(contract)
        ]
        subprocess.run([node, "--check", "-"], input=";".join(scripts).encode(), check=True, timeout=20)


async def test_the_python_sample_does_what_it_says(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    contract, customer = await _contract(rig), await rig.customer()
    sample = contract["paths"]["/keys"]["post"]["x-codeSamples"][1]["source"]
    asked = []

    class Httpx:
        def post(self, url: str, **sent: Any) -> Any:
            asked.append((url, sent))
            return httpx.Response(200, json={}, request=httpx.Request("POST", url))

    monkeypatch.setitem(sys.modules, "httpx", Httpx())
    exec(sample, {"CREDIT_ID": customer.credit_id})
    monkeypatch.undo()
    [(url, sent)] = asked
    made = await rig.client.post(url, **sent)
    assert made.status_code == 201, made.text


async def test_the_guide_for_agents_is_short_and_has_what_customers_and_proxies_call(rig: Rig) -> None:
    guide = await rig.client.get("/llms.txt")
    assert guide.headers["content-type"].startswith("text/plain")
    assert len(guide.content) <= 10 * 1024
    for path, method, _ in operations(await _contract(rig)):
        if not path.startswith(("/admin", "/webhooks")):
            assert re.search(rf"- {method}\*? {re.escape(path)}[ ?:]", guide.text), f"{method} {path}"


class _Colour(enum.Enum):
    RED = "red"


class _Part(msgspec.Struct):
    colour: _Colour
    price_usd: JsonNumber = msgspec.Raw(b"null")


class _Whole(msgspec.Struct):
    parts: dict[str, list[_Part]]
    day: date
    tail_ms: float
    either: int | str | None = None
    level: Literal[1, 2] = 1


@post("/wholes", tags=["New"], summary="Many at once")
async def _batch(data: JSONBody[list[_Whole]]) -> list[_Whole]:
    """Any."""
    return data


@get(["/others", "/v1/others"], tags=["New"], summary="Under two paths")
async def _list_others() -> list[int]:
    """Any."""
    return []


@route("/any/{name:str}", http_method=["GET", "POST"], tags=["New"], summary="Any method")
async def _whichever(name: FromPath[str]) -> dict[str, _Whole]:
    """Any."""
    return {}


def test_a_route_of_a_kind_that_is_not_here_yet_is_documented_without_further_ado() -> None:
    contract = Contract("https://pay.example.com")
    app = Litestar([_batch, _list_others, _whichever], openapi_config=contract, plugins=[contract.structs])
    document = app.openapi_schema.to_schema()
    part = document["components"]["schemas"]["_Part"]["properties"]
    assert part["colour"]["enum"] == ["red"]
    assert part["price_usd"]["type"] == ["number", "string", "null"]
    tail = document["components"]["schemas"]["_Whole"]["properties"]["tail_ms"]
    assert tail == {"type": "number", "description": "Tail, milliseconds."}
    ids = {operation["operationId"] for _, _, operation in operations(document)}
    assert ids == {"batchWhole", "getWhichever", "postWhichever", "listOthers", "listOthersV"}
    assert "/any/{name}" in reference_page(document)
