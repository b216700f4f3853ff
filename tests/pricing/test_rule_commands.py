"""What an operator puts on top of the catalogue, typed as they type it: python -m app prices override, markup, fee, end."""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app import cli
from app.kernel.db import Database
from app.pricing.catalogue import Catalogues
from app.pricing.quote import Call
from app.pricing.rows import Usage
from app.pricing.rules import NOTICE_SECONDS

ACCOUNT = str(uuid.uuid4())
USED = Usage(input_tokens=1000, output_tokens=1000)
OWN = {
    "format": "satmeter-prices-1",
    "fees": {"web": "0.02"},
    "models": [{"model": "m", "provider": "p", "usd_per_million": {"input": "1", "output": "10"}}],
}


class Operator:
    """Somebody at a shell of a house in production: nothing is sold there but what they say."""

    def __init__(self, url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._url, self._folder, self._capsys = url, folder, capsys

    def types(self, *words: str) -> tuple[int, str]:
        """The exit code, and what is printed."""
        try:
            code = cli.main(["prices", *words])
        except SystemExit as error:
            code = int(str(error.code))
        printed = self._capsys.readouterr()
        return code, printed.out + printed.err

    def does(self, *words: str) -> Any:
        code, printed = self.types(*words, "--json")
        assert code == 0, printed
        return json.loads(printed)

    def imports(self, document: Any) -> str:
        path = self._folder / "prices.json"
        path.write_text(json.dumps(document))
        code, printed = self.types("import", str(path))
        assert code == 0, printed
        return printed

    def cost_nusd(self, model: str = "m", account: str = "", features: tuple[str, ...] = (), days: int = 0) -> int:
        when = datetime.now(UTC) + timedelta(days=days, seconds=NOTICE_SECONDS)

        async def work(db: Database) -> int:
            book = await Catalogues().current(db)
            return book.price(Call(model, account=account, features=features), USED, when).cost_nusd

        return asyncio.run(self._with(work))

    async def _with(self, work: Callable[[Database], Awaitable[int]]) -> int:
        db = Database(self._url, pool_size=1)
        await db.open()
        try:
            return await work(db)
        finally:
            await db.close()


@pytest.fixture
def operator(
    clean: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Operator:
    monkeypatch.setenv("DATABASE_URL", clean)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    operator = Operator(clean, tmp_path, capsys)
    operator.imports(OWN)
    operator.does("activate", "1")
    assert operator.cost_nusd() == 11_000_000
    return operator


def test_a_fee_is_asked_once_it_is_set_and_no_more_once_it_is_ended(operator: Operator) -> None:
    assert "a fee, not imported: web; python -m app prices fee web 0.02" in operator.imports(OWN)
    fee = operator.does("fee", "web", "0.02")
    assert operator.cost_nusd(features=("web",)) == 11_000_000 + 20_000_000
    assert [(each["kind"], each["feature"], each["price_usd"]) for each in operator.does("rules")["rules"]] == [
        ("fee", "web", "0.02")
    ]
    assert operator.does("end", fee["id"]) == {"ended": fee["id"]}
    [ending] = operator.does("rules")["rules"]
    begun, ends = (datetime.fromisoformat(time) for time in (fee["effective_from"], ending["effective_to"]))
    assert begun < ends < datetime.now(UTC) + timedelta(seconds=NOTICE_SECONDS)
    assert operator.cost_nusd() == 11_000_000
    assert operator.types("end", fee["id"])[0] == 2


def test_an_override_is_the_price_whatever_is_imported(operator: Operator) -> None:
    made = operator.does("override", "m", "output", "0.25", "--per", "1000000")
    assert (made["price_usd"], made["provider"], made["effective_to"]) == ("0.00000025", "", None)
    assert operator.cost_nusd() == 1_000_000 + 250_000
    assert operator.does("override", "p/m", "input", "0")["provider"] == "p"
    assert operator.cost_nusd() == 250_000
    assert "No active version sells other" in operator.types("override", "other", "images", "0.1")[1]
    code, printed = operator.types("rules")
    assert (code, len(printed.splitlines())) == (0, 3)
    assert "p/m input: 0 USD a unit" in printed


def test_the_nearest_markup_is_put_on_and_one_may_begin_later(operator: Operator) -> None:
    operator.does("markup", "--default", "--factor", "1.2")
    operator.does("markup", "--account", ACCOUNT, "--factor", "1", "--per-request", "0.001")
    assert (operator.cost_nusd(), operator.cost_nusd(account=ACCOUNT)) == (13_200_000, 12_000_000)
    later = (datetime.now(UTC) + timedelta(days=2)).isoformat()
    operator.does("markup", "--default", "--factor", "2", "--from", later)
    assert [operator.cost_nusd(days=days) for days in (0, 3)] == [13_200_000, 22_000_000]
    kept = {(each["scope"], each["factor"], each["effective_to"]) for each in operator.does("rules")["rules"]}
    assert kept == {("default", "1.2", later), ("account", "1", None), ("default", "2", None)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fee", "web", "-1"), "price_usd"),
        (("fee", "web", "two cents"), "price_usd"),
        (("fee", "", "1"), "feature"),
        (("fee", "web", "1", "--from", "tomorrow"), "--from"),
        (("fee", "web", "1", "--from", "2020-01-01"), "past"),
        (("override", "m", "colours", "1"), "colours"),
        (("override", "m", "input", "1e-6"), "decimal number"),
        (("override", "m", "input", "1", "--per", "0"), "--per"),
        (("override", "m", "input", "0.000000000000000000000001", "--per", "1000000000000"), "finer than can be kept"),
        (("override", "m", "input", "1", "--attributes", "hd"), "attributes"),
        (("override", "m", "input", "1", "--from-tokens", "-5"), "tier_min"),
        (("override", " m", "input", "1"), "model"),
        (("markup", "--factor", "2"), "required"),
        (("markup", "--default", "--factor", "-2"), "--factor"),
        (("markup", "--default", "--factor", "1001"), "multiplier_ppm"),
        (("markup", "--default", "--per-request", "x"), "--per-request"),
        (("markup", "--account", "me", "--factor", "2"), "account"),
        (("markup", "--provider", "", "--factor", "2"), "provider"),
        (("end", "7"), "UUID"),
        (("end", ACCOUNT), "prices rules"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_saying_why(
    operator: Operator, words: tuple[str, ...], said: str
) -> None:
    code, printed = operator.types(*words)
    assert (code, said in printed) == (2, True), printed
    assert "defect" not in printed
    assert operator.does("rules") == {"rules": []}
