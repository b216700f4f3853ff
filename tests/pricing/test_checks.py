"""The operator's questions before prices are trusted: what would this file become, and does it price calls as they were billed?"""

import json
from pathlib import Path
from typing import Any

import pytest

from app.kernel.errors import AppError
from app.pricing.catalogue import compared
from app.pricing.rows import Dimension, PriceRow
from app.wiring import House
from tests.pricing.test_catalogue import NOW, a_version, an_active_version, make_active, price
from tests.pricing.test_importer import command

D = Dimension


def file(path: Path, **models: Any) -> str:
    entries = {name: {"litellm_provider": "p", "mode": "chat"} | fields for name, fields in models.items()}
    path.write_text(json.dumps(entries))
    return str(path)


async def test_a_file_is_checked_against_what_is_active_and_nothing_is_stored(unpriced: House, tmp_path: Path) -> None:
    first = file(
        tmp_path / "1.json",
        m={"input_cost_per_token": 1e-06},
        n={"input_cost_per_token": 1e-06},
        gone={"input_cost_per_token": 1e-06},
    )
    await command(unpriced, "import", first)
    await command(unpriced, "activate", "1")
    second = file(
        tmp_path / "2.json", m={"input_cost_per_token": 0.1, "likes_cats": 1}, n={"input_cost_per_token": 1e-07},
        odd={"input_cost_per_token": 1e-06, "cost_of_luck": 1}, odder={"input_cost_per_token": 1e-06, "cost_of_luck": 2},
        night={"input_cost_per_token": 1e-06, "off_peak_pricing": {"hours_utc": "00:00-06:00"}},
    )  # fmt: skip
    found = await command(unpriced, "check", second)
    assert found.data["unknown_fields"] == {"cost_of_luck": 2, "likes_cats": 1}
    assert found.data["left_out"] == {
        "p/odd": "cost_of_luck is not understood", "p/odder": "cost_of_luck is not understood",
        "p/night": "its price depends on the time of day",
    }  # fmt: skip
    assert {(each["model"], each["old_usd"], each["new_usd"]) for each in found.data["leaps"]} == {
        ("m", "0.000001", "0.1")
    }
    assert {(each["model"], each["old_usd"], each["new_usd"]) for each in found.data["drops"]} == {
        ("n", "0.000001", "0.0000001"), ("gone", "0.000001", None),
    }  # fmt: skip
    assert "p/m input: 0.000001 -> 0.1 (9999900 %)" in found.text
    assert "not sold: p/night: its price depends on the time of day" in found.text
    assert len((await command(unpriced, "list")).data["versions"]) == 1


async def test_a_price_that_leaps_is_refused_with_old_and_new_unless_told(unpriced: House) -> None:
    await an_active_version(unpriced.db, price(1000), price(1000, "n"))
    dear = await a_version(unpriced.db, price(100_000_000), price(1000, "n"))
    with pytest.raises(AppError, match=r"m input 9999900 % \(0.000000001 to 0.0001 USD\).*--allow-leaps"):
        await make_active(unpriced.db, dear)
    assert (await command(unpriced, "activate", str(dear), "--allow-leaps")).data["active"] == dear


@pytest.mark.parametrize(
    ("old", "new", "is_leap", "is_drop"),
    [
        (1000, 5000, False, False), (1000, 5001, True, False), (1000, 10_000, True, False), (1000, 1_000_000, True, False),
        (1000, 100, False, True), (1000, 500, False, False), (1000, 499, False, True), (0, 1, True, False), (1000, 0, False, True),
    ],
)  # fmt: skip
def test_the_guard_looks_both_ways(old: int, new: int, is_leap: bool, is_drop: bool) -> None:
    found = compared([price(old)], [price(new)], NOW)
    assert (bool(found.leaps()), bool(found.drops())) == (is_leap, is_drop)


def test_a_tenth_and_a_tenfold_are_a_moved_point_whatever_is_allowed() -> None:
    assert compared([price(1000)], [price(100)], NOW).drops(95)
    assert compared([price(1000)], [price(10_000)], NOW).leaps(5000)
    assert not compared([price(1000)], [price(110)], NOW).drops(95)


def test_a_price_that_appears_for_a_model_that_is_sold_is_a_leap_and_a_new_model_is_none() -> None:
    each = PriceRow("m", "p", D.REQUESTS, 10**12)
    assert [change.key[2] for change in compared([price(1)], [price(1), each], NOW).leaps()] == ["requests"]
    assert compared([price(1)], [price(1), price(7, "new")], NOW).leaps() == ()


async def test_bills_are_verified_by_model_and_kind(unpriced: House, tmp_path: Path) -> None:
    prices = file(
        tmp_path / "1.json",
        m={"input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06, "cache_read_input_token_cost": 1e-07},
    )
    usage = tmp_path / "usage.jsonl"
    lines: list[Any] = [
        {"model": "m", "usage": {"input_tokens": 1000, "output_tokens": 10}, "cost_usd": 0.00102},
        {"model": "p/m", "provider": "p", "usage": {"input_tokens": 1000, "cache_read_tokens": 1000}, "cost_usd": "0.0002"},
        {"model": "m", "usage": {"input_tokens": 1000, "cache_read_tokens": 1000}, "cost_usd": "0.0002", "at": "2026-01-01T00:00:00Z"},
        {"model": "nobody", "usage": {"input_tokens": 1}, "cost_usd": 0}, {"model": "m", "usage": {"colours": 1}, "cost_usd": 0},
        {"model": "m", "usage": {"input_tokens": 1}}, {"model": "m", "usage": {"input_tokens": 1}, "cost_usd": 1, "price": 2},
    ]  # fmt: skip
    usage.write_text("\n".join(json.dumps(line) for line in lines) + "\n\nnot json\n")
    await command(unpriced, "import", prices)
    await command(unpriced, "activate", "1")
    for found in (
        await command(unpriced, "verify", str(usage)),
        await command(unpriced, "verify", str(usage), "--prices", prices),
    ):
        assert (found.data["calls"], found.data["agreed"]) == (8, 1)
        assert [(each["line"], each["kinds"], each["billed_usd"], each["priced_usd"]) for each in found.data["differences"]] == [
            (2, ["cache_read"], "0.0002", "0.0001"), (3, ["cache_read"], "0.0002", "0.0001"),
        ]  # fmt: skip
        assert [each["line"] for each in found.data["unpriced"]] == [4, 5, 6, 7, 9]
        assert "  m cache_read: 2 calls billed 0.0004, here 0.0002 USD, x 0.5000" in found.text
