"""Every route of the contract with every credential: who gets in, who is refused before anything else, and what strangers see."""

import json
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest

from app.admin.scopes import NEEDED, SCOPES
from app.admin.tokens import create_token
from app.pricing.starter import ensure_starter
from app.topups.receipt import receipt_token
from tests.admin.desk import account_of, code_of, operator
from tests.rig import Customer, Rig
from tests.world import tell

JSON: Final = {"Content-Type": "application/json"}
COLUMNS: Final = (
    "none", "key", "foreign key", "credit id", "foreign credit id", "service token", "admin, other scopes", "admin, its scope", "revoked", "expired",
)  # fmt: skip
KINDS: Final = {
    "creditId": "credit", "apiKey": "key", "xApiKey": "key", "plainApiKey": "key", "serviceToken": "service", "adminToken": "admin",
}  # fmt: skip
KIND_OF: Final = {
    "none": "none", "key": "key", "foreign key": "key", "credit id": "credit", "foreign credit id": "credit", "service token": "service",
    "admin, other scopes": "admin", "admin, its scope": "admin",
}  # fmt: skip
"""What a column shows; a revoked or expired one is none of them."""
OWNED: Final = ("key_id", "key_hash", "invoice_id", "charge_id")
"""What is in an address and belongs to an account: a stranger's is as one that is missing."""
BODIES: Final[dict[str, Any]] = {
    "/credits/balance": {}, "/admin/tokens": {"kind": "service", "name": "made"}, "/credits/check-or-create": {"credit_id": "none"}
}  # fmt: skip
"""Where the example of the contract names a secret that is nobody's, or gives what its giver has not."""
MISSING: Final = {"key_id": str(uuid.UUID(int=7)), "key_hash": "0" * 64, "invoice_id": "missing", "charge_id": "A" * 43}


def routes(contract: Any) -> Iterator[tuple[str, str, Any]]:
    """Method, path and operation; what ends something comes last."""
    found = [(verb.upper(), path, item[verb]) for path, item in contract["paths"].items() for verb in item]
    yield from sorted(found, key=lambda one: (one[1] == "/accounts/rotate", one[0] == "DELETE" or one[1].endswith(("/rotate", "/close", "/revoke")), one[1], one[0]))  # fmt: skip


def kinds_of(operation: Any) -> set[str]:
    """Whose credential it takes, by the contract; `none` if it takes none."""
    kinds = {"gateway" if len(one) > 1 else KINDS.get(next(iter(one), ""), "none") for one in operation["security"]}
    return kinds or {"none"}


async def test_every_route_with_every_credential(rig: Rig, request: pytest.FixtureRequest) -> None:
    contract = (await rig.client.get("/openapi.json")).json()
    await ensure_starter(rig.house.db)
    one, other = await rig.customer("20"), await rig.customer("20")
    known = await belongings(rig, one)
    service = (await rig.service())["Authorization"]
    gone = await credentials_that_are_gone(rig, other)
    narrowed = {("only", scope): await operator(rig, scope) for scope in SCOPES}
    narrowed |= {("not", scope): await operator(rig, *(each for each in SCOPES if each != scope)) for scope in SCOPES}
    lines: list[str] = []
    wrong: list[str] = []

    async def ask(
        method: str, path: str, operation: Any, headers: dict[str, str], more: dict[str, str] | None = None
    ) -> Any:
        body = (
            BODIES.get(path)
            if path in BODIES
            else operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
        )
        target = filled(path, known | (more or {}))
        sent = None if method == "GET" else json.dumps({} if body is None else body)
        return await rig.client.request(method, target, headers=headers | (JSON if sent else {}), content=sent)

    for method, path, operation in routes(contract):
        takes, needed = kinds_of(operation), NEEDED.get(f"{method} {path}", "read")
        headers: dict[str, dict[str, str]] = {
            "none": {}, "foreign key": other.key, "foreign credit id": other.owner, "service token": {"Authorization": service},
            "admin, other scopes": narrowed["not", needed].headers, "key": one.key, "credit id": one.owner,
            "admin, its scope": narrowed["only", needed].headers,
        }  # fmt: skip
        kind = next((each for each in ("admin", "service", "key", "credit") if each in takes), "key")
        headers |= {"revoked": gone["revoked", kind], "expired": gone["expired", kind]}
        statuses = {}
        # Strangers first, so that what they did not see is there; its owner, who may end it, last.
        for name in (*(each for each in COLUMNS if each not in ("key", "credit id", "admin, its scope")), "key", "credit id", "admin, its scope"):  # fmt: skip
            answer = await ask(method, path, operation, headers[name])
            statuses[name] = answer.status_code
            fault = fault_of(name, takes, answer, path)
            if fault is None and name.startswith("foreign") and answer.status_code == 404 and has_owner(path):
                missing = await ask(method, path, operation, headers[name], MISSING)
                if (missing.status_code, missing.content) != (answer.status_code, answer.content):
                    fault = f"404, but a missing one is {missing.text[:80]}"
            if answer.status_code == 401 and name != "none" and "none" not in takes:
                malformed = await rig.client.request(
                    method, filled(path, known) + "?odd=1", headers=headers[name] | {"Content-Type": "text/plain"}, content=b"{" * 70_000
                )  # fmt: skip
                if malformed.status_code != 401:
                    fault = f"{malformed.status_code} before 401"
            wrong += [f"{method} {path}, {name}: {answer.status_code}: {fault}"] * (fault is not None)
        lines.append(f"{method:<6} {path:<62} " + " ".join(f"{statuses[name]:^{len(name)}}" for name in COLUMNS))
    table = "\n".join([f"{'':<69} {' '.join(COLUMNS)}", *lines])
    tell(request.config, f"Every route with every credential:\n{table}")
    assert wrong == [], "\n".join([*wrong, table])
    assert len(lines) == len(list(routes(contract))) > 80


def fault_of(name: str, takes: set[str], answer: Any, path: str) -> str | None:
    """What is wrong with how a credential was answered, by what the contract says of the route."""
    status, kind = answer.status_code, KIND_OF.get(name)
    if status >= 500 and status != 503:
        return "a defect"
    if (
        path == "/accounts/recover"
    ):  # its body proves who asks, or an event in Authorization does: nothing else is looked at
        return None if status in (401, 422, 429) else "let in"
    if takes == {"none"} or path == "/credits/check-or-create":  # no header is looked at but by what remembers answers
        is_fine = status not in (401, 403) or path.startswith("/webhooks") or kind is None
        return None if is_fine else "refused"
    if kind is None or kind not in takes - {"none"}:
        return None if status == 401 else "let in"
    if kind == "key" and path.startswith(("/keys", "/api/v1/keys")):  # one with the scope `keys` manages those below it
        return None if status == 401 else "let in without its scope"
    if name == "admin, other scopes":
        return None if status == 403 and code_of(answer) == "missing_scope" else "let in without its scope"
    if status in (401, 403):
        return "its credential is refused"
    if name.startswith("foreign") and has_owner(path):
        return None if status == 404 else "a stranger sees it"
    return None


def has_owner(path: str) -> bool:
    return any(f"{{{name}}}" in path for name in OWNED) and not path.startswith("/admin")


def filled(path: str, known: dict[str, str]) -> str:
    """An address with its parameters; `id` of a generation goes into the query."""
    if path.startswith("/admin/"):
        known = known | {"key_id": known["admin_key_id"]}
    target = re.sub(r"\{(\w+)\}", lambda found: known[found[1]], path)
    return f"{target}?id={known['charge_id']}" if path.endswith("/generation") else target


async def belongings(rig: Rig, one: Customer) -> dict[str, str]:
    """What the addresses name: a customer's things, and an account that operators may do anything to."""
    key, managed = await rig.new_key(one), await rig.new_key(one)
    invoice_id = await rig.topup(one, "20")
    [(topup_id, account_id)] = rig.sql("SELECT id, account_id FROM topup WHERE invoice_id = %s", invoice_id)
    charge = await rig.meter("charge", request_id=uuid.uuid4().hex, api_key=one.api_key, cost_usd=1)
    hashes = (await rig.client.get("/api/v1/keys", headers=one.owner)).json()["data"]
    ops = await operator(rig)
    third = await ops.post("accounts")
    admin_key = (await ops.post(f"accounts/{third['account_id']}/keys", {"name": "k"}))["data"]["_id"]
    token = (await ops.post("tokens", {"kind": "service", "name": "gone"}))["about"]["id"]
    rule = (await ops.post("prices/fees", {"feature": "search", "price_usd": 1}))["id"]
    return {
        "key_id": key["_id"], "key_hash": next(each["hash"] for each in hashes if each["name"] == managed["name"]),
        "invoice_id": invoice_id, "topup_id": str(topup_id), "charge_id": charge.json()["charge_id"],
        "token": receipt_token(rig.house.settings.pepper, account_id, topup_id), "method": "btc", "backend": "btcpay",
        "model_id": "openai/gpt-4o", "path": "v1/x", "account_id": third["account_id"], "admin_key_id": admin_key, "version": "1",
        "rule_id": rule, "token_id": token, "audit_id": "last", "notice_id": str(uuid.uuid4()),
    }  # fmt: skip


async def credentials_that_are_gone(rig: Rig, whose: Customer) -> dict[tuple[str, str], dict[str, str]]:
    """A revoked and an expired one of each kind. A credit id never expires: the one that was rotated is both."""
    ops, pepper = await operator(rig), rig.house.settings.pepper
    revoked, expired = await rig.new_key(whose), await rig.new_key(whose)
    await rig.client.delete(f"/keys/{revoked['_id']}", headers=whose.owner)
    rig.sql("UPDATE api_key SET expire_at = now() - interval '1 s' WHERE id = %s", expired["_id"])
    third = await rig.customer()
    await ops.post(f"accounts/{account_of(rig, third)}/rotate")
    found = {("revoked", "key"): bearer(revoked["api_key"]), ("expired", "key"): bearer(expired["api_key"])}
    found |= {("revoked", "credit"): third.owner, ("expired", "credit"): third.owner}
    for kind in ("admin", "service"):
        made = await ops.post("tokens", {"kind": kind, "name": f"gone-{kind}"})
        assert (await ops.ask("DELETE", f"tokens/{made['about']['id']}")).status_code == 200
        soon = datetime.now(UTC) + timedelta(days=1)
        old = await create_token(rig.house.db, pepper, kind, f"old-{kind}", expires_at=soon)
        rig.sql(f"UPDATE {kind}_token SET expires_at = now() - interval '1 s' WHERE name = 'old-{kind}'")
        found |= {("revoked", kind): bearer(made["token"]), ("expired", kind): bearer(old)}
    return found


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def test_every_route_of_an_operator_has_its_scope_and_nothing_else_has(rig: Rig) -> None:
    contract = (await rig.client.get("/openapi.json")).json()
    found = {f"{method} {path}" for method, path, _ in routes(contract) if path.startswith("/admin")}
    assert found == set(NEEDED)
    assert {NEEDED[route] for route in found if route.startswith("GET ")} == {"read"}
    assert {route.rpartition("/")[2] for route, scope in NEEDED.items() if scope == "money"} == {"credit", "debit", "resolve"}  # fmt: skip
    assert {route.split()[1].split("/")[2] for route, scope in NEEDED.items() if scope == "tokens"} == {"tokens"}
    assert {route.split()[1].split("/")[2] for route, scope in NEEDED.items() if scope == "prices"} == {"prices"}
