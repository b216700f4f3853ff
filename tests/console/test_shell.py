"""The pages' frame: who is let in, what a form must bear, which policy holds, and what a first visit loads."""

import asyncio
import gzip
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from app.console import static
from app.console.colours import contrast, theme_text
from app.console.session import Session, csrf_token, read_session, set_cookie
from app.console.signed_out import forget_signed_out
from app.kernel.settings import Settings, SettingsError, load
from tests.console.street import FORM, Visitor, hidden_of
from tests.door import JSON, Door
from tests.world import tell

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
FIRST_LOAD_BYTES = 60_000


async def test_a_customer_signs_in_with_a_credit_id_or_a_key_and_is_sent_home(door: Door) -> None:
    customer = await door.customer("25")
    for credential in (customer.credit_id, customer.credit_id.upper(), customer.api_key):
        visitor = Visitor(door)
        answer = await visitor.sign_in(credential)
        assert (answer.status, answer.headers["location"]) == (303, "/console")
        page = await visitor.get("/console")
        assert page.status == 200
        assert "$25.00" in page.body.decode()


async def test_an_operator_signs_in_with_an_admin_token_and_is_no_customer(door: Door) -> None:
    token = (await door.admin())["Authorization"].split()[1]
    visitor = Visitor(door)
    answer = await visitor.sign_in_as_operator(token)
    assert (answer.status, answer.headers["location"]) == (303, "/operator")
    assert (await visitor.get("/console")).status == 303
    assert (await Visitor(door).sign_in(token)).status == 401


@pytest.mark.parametrize(
    "credential", ["", "sk-no", "00000000-0000-4000-8000-000000000000", "svc-x", "'; --", "é" * 50]
)
async def test_what_proves_nothing_signs_nobody_in_and_is_not_repeated(door: Door, credential: str) -> None:
    visitor = Visitor(door)
    answer = await visitor.sign_in(credential)
    assert answer.status == 401
    assert not any("customer" in line for line in answer.cookies)
    assert not credential or credential not in answer.body.decode()
    assert (await visitor.get("/console")).headers["location"] == "/console/sign-in"


async def test_the_cookie_is_for_this_host_alone_unseen_by_scripts_and_ends_after_twelve_hours(door: Door) -> None:
    customer = await door.customer()
    answer = await Visitor(door).sign_in(customer.credit_id)
    (line,) = [line for line in answer.cookies if "customer" in line]
    name, flags = line.partition("=")[0], {each.strip().lower() for each in line.split(";")[1:]}
    assert name == "__Host-customer"
    assert flags == {"httponly", "secure", "samesite=strict", "path=/", "max-age=43200"}
    assert customer.credit_id not in line
    assert customer.credit_id.encode().hex() not in line


async def test_a_session_is_over_after_twelve_hours_and_with_another_sealing_key(door: Door) -> None:
    settings = door.rig.house.settings
    session = Session.begun("customer", "secret")
    cookie = set_cookie(settings, session)
    jar = {cookie.key: cookie.value or ""}
    assert read_session(settings, jar, "customer", session.began_at + 12 * 3600 - 1) == session
    assert read_session(settings, jar, "customer", session.began_at + 12 * 3600) is None
    assert read_session(settings, {"__Host-operator": jar["__Host-customer"]}, "operator") is None
    others = replace(settings, sealing_keys=(("k9", b"9" * 32),))
    assert read_session(others, jar, "customer") is None


def test_over_plain_http_elsewhere_the_cookie_has_neither_the_prefix_nor_secure(settings: Settings) -> None:
    for url, is_secure in (
        ("http://127.0.0.1:8080", True), ("http://localhost", True), ("http://[::1]:1", True), ("https://pay.example", True),
        ("http://192.168.1.5:8080", False), ("http://pay.example", False),
    ):  # fmt: skip
        cookie = set_cookie(replace(settings, public_url=url), Session.begun("customer", "x"))
        assert (cookie.secure, cookie.key.startswith("__Host-")) == (is_secure, is_secure), url


async def test_a_revoked_key_and_a_rotated_credit_id_end_their_sessions_at_once(door: Door) -> None:
    customer = await door.customer("10")
    owner = {"x-credit-id": customer.credit_id}
    made = await door.ask("POST", "/keys", owner | {"Content-Type": "application/json"}, b'{"name": "other"}')
    visitor = Visitor(door)
    await visitor.sign_in(made.json["data"]["api_key"])
    assert (await visitor.get("/console")).status == 200
    await door.ask("DELETE", f"/keys/{made.json['data']['_id']}", owner)
    answer = await visitor.get("/console")
    assert (answer.status, answer.headers["location"]) == (303, "/console/sign-in?said=session-over")
    assert "__Host-customer" not in visitor.cookies


async def test_the_cookie_never_opens_the_api(door: Door) -> None:
    customer = await door.customer("10")
    visitor = Visitor(door)
    await visitor.sign_in(customer.credit_id)
    for path in ("/credits/balance", "/keys", "/queries/history", "/topups"):
        answer = await visitor.get(path)
        assert answer.status == 401, path
    token = (await door.admin())["Authorization"].split()[1]
    operator = Visitor(door)
    await operator.sign_in_as_operator(token)
    assert (await operator.get("/admin/stats")).status == 401


async def test_a_form_without_its_sessions_token_does_nothing(door: Door) -> None:
    customer, stranger = await door.customer("10"), await door.customer("10")
    visitor, other = Visitor(door), Visitor(door)
    await visitor.sign_in(customer.credit_id)
    await other.sign_in(stranger.credit_id)
    theirs = hidden_of((await other.get("/console")).body.decode(), "/console/sign-out")["csrf"]
    for fields in ({}, {"csrf": ""}, {"csrf": "0" * 32}, {"csrf": theirs}, {"csrf": "é"}):
        answer = await visitor.post("/console/sign-out", fields)
        assert answer.status == 403, fields
        assert not answer.cookies
        assert (await visitor.get("/console")).status == 200
    opened = await Visitor(door).post("/console/open", {})
    assert opened.status == 403


SIGNED_IN: Final = ("customer", "key", "operator")
"""Who has a session: with a credit id, with a key, with an admin token."""


async def sessions_of(door: Door, who: str, count: int) -> tuple[list[Visitor], str, str]:
    """As many sessions with one credential, each in a browser of its own; with the page they see and the credential."""
    customer = await door.customer("10")
    operator = (await door.admin())["Authorization"].split()[1]
    secret = {"customer": customer.credit_id, "key": customer.api_key, "operator": operator}[who]
    visitors = [Visitor(door) for _ in range(count)]
    for each in visitors:
        await (each.sign_in_as_operator(secret) if who == "operator" else each.sign_in(secret))
    return visitors, "/operator" if who == "operator" else "/console", secret


@pytest.mark.parametrize("who", SIGNED_IN)
async def test_signing_out_ends_the_session_for_a_copy_of_its_cookie_too_and_no_other(door: Door, who: str) -> None:
    (visitor, other), page, _ = await sessions_of(door, who, 2)
    copy = Visitor(door, dict(visitor.cookies))
    fields = hidden_of((await visitor.get(page)).body.decode(), f"{page}/sign-out")
    assert (await copy.get(page)).status == 200
    answer = await visitor.post(f"{page}/sign-out", fields)
    assert (answer.status, answer.headers["location"]) == (303, f"{page}/sign-in?said=signed-out")
    assert not [name for name in visitor.cookies if name.endswith(("customer", "operator"))]
    stolen = dict(copy.cookies)
    other_page = f"{page}/audit" if who == "operator" else f"{page}/topup"
    for refused in (
        await Visitor(door, dict(stolen)).get(page),
        await Visitor(door, dict(stolen)).get(other_page),
        await Visitor(door, dict(stolen)).post(f"{page}/sign-out", fields),
    ):
        assert (refused.status, refused.headers["location"]) == (303, f"{page}/sign-in?said=session-over")
    assert (await other.get(page)).status == 200


@pytest.mark.parametrize("who", SIGNED_IN)
async def test_who_signs_in_anew_is_done_with_the_session_of_before(door: Door, who: str) -> None:
    (visitor,), page, secret = await sessions_of(door, who, 1)
    copy = Visitor(door, dict(visitor.cookies))
    await (visitor.sign_in_as_operator(secret) if who == "operator" else visitor.sign_in(secret))
    assert (await copy.get(page)).headers["location"].endswith("?said=session-over")
    assert (await visitor.get(page)).status == 200


async def test_opening_another_account_ends_the_session_that_the_browser_had(door: Door) -> None:
    (visitor,), page, _ = await sessions_of(door, "customer", 1)
    copy = Visitor(door, dict(visitor.cookies))
    assert (await visitor.submit("/console/sign-in", "/console/open")).status == 200
    assert (await copy.get(page)).status == 303
    assert (await visitor.get(page)).status == 200


ENDS: Final = {
    "a key is revoked": "key", "a key is switched off": "key", "a parent is revoked": "child", "a credit id is rotated": "customer",
    "an account is recovered": "customer", "an account is closed": "customer", "a token is revoked": "operator",
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
async def test_what_ends_a_credential_ends_its_sessions(door: Door, how: str) -> None:
    customer, admin = await door.customer(), await door.admin()
    owner = {"x-credit-id": customer.credit_id} | JSON
    parent = (await door.ask("POST", "/keys", owner, b'{"name": "parent", "scopes": ["keys", "balance"]}')).json["data"]
    bearer = {"Authorization": f"Bearer {parent['api_key']}"} | JSON
    child = (await door.ask("POST", "/keys", bearer, b'{"name": "child", "scopes": ["balance"]}')).json["data"]
    visitor, code = Visitor(door), ""
    if ENDS[how] == "operator":
        await visitor.sign_in_as_operator(admin["Authorization"].split()[1])
    else:
        await visitor.sign_in(
            {"key": parent, "child": child}.get(ENDS[how], {"api_key": customer.credit_id})["api_key"]
        )
    page = "/operator" if ENDS[how] == "operator" else "/console"
    if how == "an account is recovered":
        shown = (await visitor.submit("/console/account", "/console/account/recovery")).body.decode()
        (code,) = re.findall(r"<code>([^<]+)</code>", shown)
    assert (await visitor.get(page)).status == 200

    match how:
        case "a key is revoked" | "a parent is revoked":
            done = await door.ask("DELETE", f"/keys/{parent['_id']}", owner)
        case "a key is switched off":
            done = await door.ask("PATCH", f"/keys/{parent['_id']}", owner, b'{"disabled": true}')
        case "a credit id is rotated":
            done = await door.ask("POST", "/accounts/rotate", owner, b"{}")
        case "an account is recovered":
            done = await Visitor(door).submit("/console/recover", "/console/recover", recovery_code=code)
        case "an account is closed":
            done = await door.ask("DELETE", "/accounts", owner)
        case _:
            (token_id,) = door.rig.sql("SELECT id FROM admin_token WHERE name = 'operator'")[0]
            done = await door.ask("DELETE", f"/admin/tokens/{token_id}", admin | JSON, b'{"reason": "lost"}')
    assert done.status in (200, 201), done.body
    refused = await visitor.get(page)
    assert (refused.status, refused.headers["location"]) == (303, f"{page}/sign-in?said=session-over")


async def test_who_signed_out_is_remembered_as_long_as_the_cookie_would_have_lasted(door: Door) -> None:
    (visitor,), page, _ = await sessions_of(door, "customer", 1)
    await visitor.submit(page, f"{page}/sign-out")
    db = door.rig.house.db
    assert await forget_signed_out(db) == 0
    door.rig.sql("UPDATE session_over SET over_at = now() - interval '13 hours 1 minute'")
    assert await forget_signed_out(db) == 1


async def test_a_live_page_stops_telling_when_its_session_is_signed_out(door: Door) -> None:
    (visitor,), page, _ = await sessions_of(door, "customer", 1)
    made = await visitor.submit("/console/topup", "/console/topup", pick="USD:5")
    jar = {"Cookie": "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())}
    telling = asyncio.create_task(door.rig.client.get(f"{made.headers['location']}/live", headers=jar))
    assert (
        await visitor.get(page)
    ).status == 200  # and meanwhile that was let in, which an unpaid top-up would keep open
    await visitor.submit(page, f"{page}/sign-out")
    told = await asyncio.wait_for(telling, 20)
    assert b"event: over" not in told.content


async def test_an_account_is_opened_once_however_often_the_form_is_sent(door: Door) -> None:
    visitor = Visitor(door)
    fields = hidden_of((await visitor.get("/console/sign-in")).body.decode(), "/console/open")
    first, again = await visitor.post("/console/open", fields), await visitor.post("/console/open", fields)
    assert (first.status, again.status) == (200, 200)
    ids = [re.findall(r"<code>([0-9a-f-]{36})</code>", answer.body.decode()) for answer in (first, again)]
    assert len(ids[0]) == 1
    assert ids[0] == ids[1]
    assert (await visitor.get("/console")).status == 200
    assert ids[0][0] not in (await visitor.get("/console")).body.decode()


async def test_every_answer_of_a_page_bears_the_policy_also_a_refusal_and_a_redirect(door: Door) -> None:
    visitor = Visitor(door)
    for path, status in (
        ("/console/sign-in", 200), ("/operator/sign-in", 200), ("/console", 303), ("/operator", 303), ("/console/no", 404),
    ):  # fmt: skip
        answer = await visitor.get(path)
        assert answer.status == status, path
        assert answer.headers["content-security-policy"] == POLICY, path
        assert answer.headers["referrer-policy"] == "no-referrer", path
        assert answer.headers["cache-control"] == "no-store", path
        assert "access-control-allow-origin" not in (await visitor.get(path, Origin="https://x.example")).headers
    answer = await visitor.post("/console/sign-in", {})
    assert (answer.status, answer.headers["content-security-policy"]) == (403, POLICY)


async def test_no_page_has_a_style_attribute_an_inline_script_or_anything_from_elsewhere(door: Door) -> None:
    for path in ("/console/sign-in", "/operator/sign-in"):
        page = (await Visitor(door).get(path)).body.decode()
        assert not re.search(r"<[^>]*\s(style|on\w+|hx-on[^=]*)=", page), path
        assert not re.search(r"<script(?![^>]*\ssrc=)", page), path
        assert not re.search(r"""(src|href)="(https?:)?//""", page), path


async def test_the_first_visit_loads_at_most_60_kb(door: Door, pytestconfig: pytest.Config) -> None:
    page = (await Visitor(door).get("/console/sign-in")).body
    loaded = re.findall(r'(?:src|href)="(/console/static/[^"]+)"', page.decode())
    assert len(loaded) >= 6
    total = len(gzip.compress(page))
    for path in loaded:
        answer = await door.ask("GET", path, {"Accept-Encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        total += len(answer.body)
        plain = await door.ask("GET", path)
        assert gzip.decompress(answer.body) == plain.body
    plots = sum(len(static.assets()[name].squeezed) for name in ("uplot.js", "uplot.css"))
    tell(pytestconfig, f"first load: {total:,} bytes gzipped; with plots {total + plots:,}")
    assert total + plots <= FIRST_LOAD_BYTES


async def test_a_file_is_known_by_its_hash_alone(door: Door) -> None:
    for path in ("console.css", "console.0000000000000000.css", "..%2fshell.py", "vendored.json", "theme.css"):
        assert (await door.ask("GET", f"/console/static/{path}")).status == 404, path


def test_what_was_vendored_is_what_was_pinned_and_every_package_has_its_licence() -> None:
    folder = static.FOLDER / "vendor"
    told = json.loads((folder / "vendored.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*told, "vendored.json"}
    for name, entry in told.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"], name
    pinned = (Path(__file__).parents[2] / "deploy/vendor.py").read_text()
    for package in {entry["from"].rpartition("@")[0] for entry in told.values()}:
        assert f'"{package}"' in pinned
        assert any(package in entry["from"] for name, entry in told.items() if name.endswith(".LICENSE")), package


@pytest.mark.parametrize("colour", ["#2f5bea", "#ffee00", "#000000", "#ffffff", "#ff0000", "#777777", "#0a0a40"])
def test_any_colour_can_be_read_on_light_and_on_dark_pages(colour: str) -> None:
    light, dark, on_light, on_dark = (
        (int(found[:2], 16), int(found[2:4], 16), int(found[4:], 16))
        for found in re.findall(r"#([0-9a-f]{6})", theme_text(colour))[:4]
    )
    assert contrast(light, (255, 255, 255)) >= 4.5
    assert contrast(dark, (24, 24, 27)) >= 4.5
    assert contrast(light, on_light) >= 4.5
    assert contrast(dark, on_dark) >= 4.5


@pytest.mark.parametrize("colour", ["blue", "#fff", "2f5bea", "#2f5beg", "#2f5bea;}"])
def test_a_colour_that_is_none_is_refused_by_its_name(tmp_path: Path, colour: str) -> None:
    with pytest.raises(SettingsError, match="SERVICE_COLOUR"):
        load({"DATA_DIR": str(tmp_path), "SERVICE_COLOUR": colour})


async def test_another_sites_link_to_a_page_is_followed_once_more_with_the_cookie(door: Door) -> None:
    answer = await door.ask("GET", "/console?said=welcome", {"Sec-Fetch-Site": "cross-site"})
    assert (answer.status, answer.headers["refresh"]) == (200, "0; url=/console?said=welcome")


async def test_a_form_that_is_no_form_is_refused_as_a_page(door: Door) -> None:
    visitor = Visitor(door)
    await visitor.get("/console/sign-in")
    answer = await door.ask("POST", "/console/sign-in", {"Content-Type": "application/json"}, b"{}")
    assert answer.status in (403, 415)
    answer = await door.ask("POST", "/console/sign-in", FORM, b"csrf=%00&x=\xff")
    assert answer.status in (403, 422)


def test_a_token_tells_nothing_of_the_session(settings: Settings) -> None:
    one, other = Session.begun("customer", "secret"), Session.begun("customer", "secret")
    assert csrf_token(settings, one) != csrf_token(settings, other)
    assert one.nonce not in csrf_token(settings, one)
