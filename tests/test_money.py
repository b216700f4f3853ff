"""Money from text to integers and back: exact, strict, rounded once and in the promised direction."""

import contextlib
import json
import re
from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.kernel.errors import InvalidField
from app.kernel.money import (
    COIN_PLACES,
    CURRENCIES,
    MAX_NUSD,
    NUSD_PER_USD,
    Currency,
    charge_nusd,
    decimal_of,
    decimal_text,
    is_given,
    number,
    parse_amount,
    parse_usd,
    reported_usd,
    share_nusd,
    units_of,
    usd,
    usd_or_null,
    usd_text,
    worth_nusd,
)

settings.register_profile("unhurried", deadline=None)  # a busy machine is not a failure
settings.load_profile("unhurried")
USD_TEXT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")
COIN_TEXT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,8})?")
COINS = [currency for currency in CURRENCIES.values() if currency.coin]
NUMBERISH = st.one_of(
    st.text(alphabet="0123456789.+-eE_ \"'xNaIinfty,١１²\u00a0\n\x00", max_size=30),
    st.integers(0, 10**21).map(lambda units: decimal_text(units, 9)),
    st.integers(0, 10**12).map(lambda units: f'"{decimal_text(units, 8)}"'),
)
AMOUNTS_NUSD = st.integers(min_value=0, max_value=MAX_NUSD)
GOOD_TEXT = st.builds(
    lambda units, zeros: (decimal_text(units, 9) + ("0" * zeros if units % NUSD_PER_USD else ""))[:22],
    st.integers(0, 10**21 - 1), st.integers(0, 3),
)  # fmt: skip

WRONG = (
    "", " ", "NaN", "sNaN", "Infinity", "-Infinity", "inf", "1e999", "1E5", "1e0", "-1", "-0", "+1", "1_000", " 1", "1 ", "١", "１", "²", "0x10",
    "1.", ".5", "1..2", "1,5", "1.2.3", "1234567890123", "0.1234567890", "1" * 400, "true", "null", "[]", "{}", "1\n", "\t1", "1\x00", "½", "$1",
)  # fmt: skip


def _parsed(text: str) -> int | None:
    """The nano-USD of a text, None if it is refused; whatever else happens is a defect."""
    try:
        return parse_usd(text.encode(), "amount")
    except InvalidField as error:
        named = (error.param, "amount" in error.message)
    assert named == ("amount", True)
    return None


# --- text to integers --------------------------------------------------------------------------------------


@given(NUMBERISH)
@example("999999999999.999999999")
@example('"1"')
@example('"')
@example('""')
def test_any_text_is_an_exact_amount_or_invalid_field_and_nothing_else(text: str) -> None:
    bare = text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text
    found = _parsed(text)
    fits = USD_TEXT.fullmatch(bare) is not None and Decimal(bare) * NUSD_PER_USD <= MAX_NUSD
    assert (found is not None) == fits
    if found is not None:
        assert Decimal(found) == Decimal(bare) * NUSD_PER_USD


@given(st.binary(max_size=200), st.sampled_from(list(CURRENCIES.values())))
def test_any_bytes_are_an_amount_or_invalid_field_and_nothing_else(raw: bytes, currency: Currency) -> None:
    with contextlib.suppress(InvalidField):
        assert parse_amount(raw, currency, "a") >= 0


@given(GOOD_TEXT, st.sampled_from(["{}", '"{}"']))
def test_a_json_number_and_a_json_string_mean_the_same(text: str, quoted: str) -> None:
    assert _parsed(text) == _parsed(quoted.format(text))


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_plain_decimal_is_refused_bare_and_quoted(text: str) -> None:
    assert _parsed(text) is None
    assert _parsed(f'"{text}"') is None
    for currency in COINS:
        with pytest.raises(InvalidField):
            parse_amount(text.encode(), currency, "amount")


def test_more_than_the_books_can_hold_is_refused_with_the_figure() -> None:
    assert _parsed(usd_text(MAX_NUSD)) == MAX_NUSD
    with pytest.raises(InvalidField, match=r"at most 1000000000 USD, got 1000000000\.000000001"):
        parse_usd(usd_text(MAX_NUSD + 1).encode(), "amount")
    assert MAX_NUSD * 9 < 2**63


# --- what programs report ----------------------------------------------------------------------------------

REPORTED_WRONG = (
    "", "-1", "-0", "-4.5e-05", "+1", "NaN", "Infinity", "1e", "e5", "1e1.5", "1e+-3", ".5", "1.", "1_0", " 1", "1 ", "1\n", "0x10", "١e3", "true",
    "1e10", "1e999", "1e99999999999999999999999999", "1000000000.0000000001", "9" * 11, "1" * 41, "0." + "0" * 39, "1" + "0" * 400,
)  # fmt: skip


def _nearest(exact_usd: Fraction) -> int:
    """By another way than the code: round() of a fraction takes the nearest, and of two the even one."""
    return max(1, round(exact_usd * NUSD_PER_USD)) if exact_usd else 0


@given(st.floats(0, 10**9, allow_nan=False))
@example(4.5e-05)
@example(0.00032969999999999994)
@example(5e-324)
@example(0.0)
def test_whatever_json_dumps_writes_for_a_cost_is_the_nearest_nano_dollar(cost: float) -> None:
    text = json.dumps(abs(cost))
    for raw in (text, json.dumps(text)):
        assert reported_usd(raw.encode(), "cost_usd") == _nearest(Fraction(text))


@given(st.integers(0, 10**20), st.integers(-40, 9))
def test_any_decimal_of_forty_characters_is_read_exactly_whatever_its_exponent(digits: int, exponent: int) -> None:
    exact_usd = Fraction(digits) * Fraction(10) ** exponent
    for text in {f"{digits}e{exponent}", f"{digits}E{exponent:+d}", str(Decimal(digits).scaleb(exponent))}:
        if len(text) <= 40 and exact_usd * NUSD_PER_USD <= MAX_NUSD:
            found = reported_usd(text.encode(), "cost_usd")
            assert found == _nearest(exact_usd)
            assert found - reported_usd(text.encode(), "cost_usd", down=True) in (0, 1)


@given(AMOUNTS_NUSD)
def test_a_plain_amount_means_the_same_where_it_is_reported(amount_nusd: int) -> None:
    assert reported_usd(bytes(usd(amount_nusd)), "a") == amount_nusd


@pytest.mark.parametrize(
    ("text", "amount_nusd"),
    [
        ("1e-9", 1), ("0.4e-9", 1), ("1e-30", 1), ("1e-99999999999999999999999", 1), ("0e99999999999999999999999", 0), ("0.0e5", 0),
        ("1.5e-9", 2), ("2.5e-9", 2), ("2.50000000000000001e-9", 3), ("1e9", MAX_NUSD), ("1E+9", MAX_NUSD), ("0.1e1", NUSD_PER_USD),
        ("0.0000000000000000000000000000000000000", 0),
    ],
)  # fmt: skip
def test_what_is_not_nothing_is_never_read_as_nothing(text: str, amount_nusd: int) -> None:
    assert reported_usd(text.encode(), "a") == amount_nusd
    assert reported_usd(f'"{text}"'.encode(), "a") == amount_nusd


@pytest.mark.parametrize("text", REPORTED_WRONG)
def test_what_no_cost_can_be_is_refused_where_it_is_reported_too(text: str) -> None:
    for raw in (text, f'"{text}"'):
        with pytest.raises(InvalidField) as refused:
            reported_usd(raw.encode(), "cost_usd")
        assert refused.value.param == "cost_usd"


@given(AMOUNTS_NUSD)
def test_an_amount_written_and_read_again_is_itself(amount_nusd: int) -> None:
    assert parse_usd(bytes(usd(amount_nusd)), "a") == amount_nusd
    assert (
        msgspec.json.decode(msgspec.json.encode({"a": usd(amount_nusd)}), type=dict[str, Decimal])["a"] * NUSD_PER_USD
        == amount_nusd
    )


@given(st.text(max_size=20))
def test_a_huge_text_costs_no_more_than_a_short_one(text: str) -> None:
    assert _parsed("1" + text + "0" * 60_000) is None


@pytest.mark.parametrize(
    ("raw", "given_"), [(b"", False), (b"null", False), (b"0", True), (b'""', True), (b"false", True)]
)
def test_only_absent_and_null_are_not_given(raw: bytes, given_: bool) -> None:
    assert is_given(msgspec.Raw(raw)) is given_


# --- coins ---------------------------------------------------------------------------------------------------


@given(st.sampled_from(COINS), NUMBERISH)
def test_a_coin_amount_is_exact_or_refused(coin: Currency, text: str) -> None:
    bare = text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text
    try:
        units = parse_amount(text.encode(), coin, "amount")
    except InvalidField:
        assert not COIN_TEXT.fullmatch(bare) or Decimal(bare) * coin.scale % 1 != 0
    else:
        assert COIN_TEXT.fullmatch(bare)
        assert Decimal(bare) * coin.scale == units


@pytest.mark.parametrize(
    ("code", "text", "units"),
    [
        ("BTC", "0.00000001", 1), ("BTC", "21000000", 2_100_000_000_000_000), ("LTC", "1.5", 150_000_000), ("LBTC", "0.00005", 5_000),
        ("XMR", "0.00000001", 10_000), ("XMR", "1", 10**12), ("SATS", "1000", 1000), ("SATS", "1000.000", 1000), ("USD", "0.000000001", 1),
    ],
)  # fmt: skip
def test_a_coin_is_counted_in_its_smallest_unit(code: str, text: str, units: int) -> None:
    assert parse_amount(text.encode(), CURRENCIES[code], "amount") == units


@pytest.mark.parametrize(
    ("code", "text"),
    [("BTC", "0.000000001"), ("XMR", "0.000000001"), ("LTC", "1.123456789"), ("SATS", "0.5"), ("SATS", "1.00000001")],
)
def test_more_decimals_than_eight_or_than_the_coin_has_are_refused(code: str, text: str) -> None:
    with pytest.raises(InvalidField):
        parse_amount(text.encode(), CURRENCIES[code], "amount")


def test_monero_has_twelve_places_and_bitcoin_is_kept_in_millisatoshi() -> None:
    assert COIN_PLACES == {"BTC": 11, "LTC": 8, "LBTC": 8, "XMR": 12}
    assert bytes(number(1, COIN_PLACES["XMR"])) == b"0.000000000001"
    assert units_of(Decimal("0.00000001"), COIN_PLACES["BTC"]) == 1000


# --- integers to text ------------------------------------------------------------------------------------------


@given(st.integers(), st.integers(min_value=0, max_value=20))
def test_units_are_printed_plainly_and_exactly(units: int, places: int) -> None:
    text = decimal_text(units, places)
    assert re.fullmatch(r"-?[0-9]+(\.[0-9]*[1-9])?", text)
    assert Fraction(text) == Fraction(units, 10**places)
    assert not re.match(r"-?0[0-9]", text)
    assert text != "-0"


@pytest.mark.parametrize(
    ("amount_nusd", "text"),
    [(0, "0"), (1, "0.000000001"), (45_000, "0.000045"), (81_556_010, "0.08155601"), (-45_000, "-0.000045"), (10**18, "1000000000"), (10**10, "10"), (-1, "-0.000000001")],
)  # fmt: skip
def test_usd_is_never_printed_with_an_exponent_or_a_float_s_tail(amount_nusd: int, text: str) -> None:
    assert usd_text(amount_nusd) == text
    assert bytes(usd(amount_nusd)) == text.encode()


def test_no_amount_is_null() -> None:
    assert bytes(usd_or_null(None)) == b"null"
    assert bytes(usd_or_null(0)) == b"0"


# --- the few roundings --------------------------------------------------------------------------------------------

LINES = st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), max_size=8)


@given(LINES)
def test_a_charge_is_rounded_up_once_over_all_its_lines(lines: list[tuple[int, int]]) -> None:
    exact = sum((Fraction(units * price, 1000) for units, price in lines), Fraction(0))
    assert exact <= charge_nusd(lines) < exact + 1
    by_line = sum(charge_nusd([line]) for line in lines)
    assert charge_nusd(lines) <= by_line <= charge_nusd(lines) + max(0, len(lines) - 1)


def test_a_thousand_pico_lines_cost_one_nano() -> None:
    assert charge_nusd([(1, 1)] * 1000) == 1
    assert charge_nusd([(1, 1)] * 1001) == 2
    assert charge_nusd([]) == 0


@given(AMOUNTS_NUSD, st.integers(0, 100))
def test_a_share_is_rounded_down_and_never_more_than_the_whole(amount_nusd: int, percent: int) -> None:
    share = share_nusd(amount_nusd, percent)
    assert share <= Fraction(amount_nusd * percent, 100) < share + 1
    assert 0 <= share <= amount_nusd


def test_a_share_of_a_debt_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        share_nusd(-1, 5)


COIN_AMOUNTS = st.decimals(min_value=0, max_value=21_000_000, places=12)
RATES = st.decimals(min_value="0.00000001", max_value=10**9, places=8)


@given(COIN_AMOUNTS, RATES)
def test_coins_are_worth_their_exact_product_rounded_down(coins: Decimal, usd_per_coin: Decimal) -> None:
    exact = Fraction(coins) * Fraction(usd_per_coin) * NUSD_PER_USD
    worth = worth_nusd(coins, usd_per_coin)
    assert worth <= exact < worth + 1


@given(st.lists(COIN_AMOUNTS, min_size=2, max_size=5), RATES)
def test_paying_in_pieces_never_gives_more_than_paying_at_once(pieces: list[Decimal], rate: Decimal) -> None:
    assert sum(worth_nusd(piece, rate) for piece in pieces) <= worth_nusd(sum(pieces, Decimal(0)), rate)


def test_the_surrounding_decimal_context_changes_nothing() -> None:
    with localcontext() as context:
        context.prec = 5
        assert worth_nusd(Decimal("20999999.99999999"), Decimal("123456.78901234")) == int(
            (Fraction("20999999.99999999") * Fraction("123456.78901234") * NUSD_PER_USD).__floor__()
        )
        assert decimal_of(123_456_789_012, 9) == Decimal("123.456789012")
        assert units_of(Decimal("123456789.012345678"), 9) == 123_456_789_012_345_678


@given(st.decimals(min_value=0, max_value=10**9, places=15), st.integers(0, 12))
def test_units_are_rounded_down_unless_up_is_asked_for(amount: Decimal, places: int) -> None:
    down, up = units_of(amount, places), units_of(amount, places, up=True)
    exact = Fraction(amount) * 10**places
    assert down <= exact <= up <= down + 1
    assert down == int((amount * 10**places).to_integral_value(ROUND_FLOOR))


@given(AMOUNTS_NUSD, st.integers(0, 12))
def test_units_become_a_decimal_and_the_same_units_again(units: int, places: int) -> None:
    assert units_of(decimal_of(units, places), places) == units
