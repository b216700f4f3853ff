"""The receipt: what came and what is to go, to the last unit; a sum that adds up; words for people; nothing of its own runs."""

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from html import unescape

import pytest

from app.topups.gateway import AdditionalStatus, InvoiceStatus, PaymentStatus
from tests.console.street import Visitor
from tests.console.test_shell import POLICY
from tests.door import Door
from tests.rig import Customer, exact

D = Decimal
METHODS = [("btc-lightning", "5"), ("btc", "20"), ("ltc", "20"), ("lbtc", "3"), ("xmr", "30")]
WIRE_WORDS = ("PaidPartial", "PaidLate", "PaidOver", "Processing", "Settled", "Marked", "None")


async def topup(door: Door, method: str, amount: str) -> tuple[Customer, str, str]:
    """A customer, the invoice, and the receipt's path."""
    customer = await door.rig.customer()
    invoice_id = await door.rig.topup(customer, amount, method)
    said = await door.rig.client.get(f"/topup/status/{invoice_id}", headers=customer.key)
    return customer, invoice_id, "/receipts/" + said.json()["receipt_url"].rpartition("/")[2]


async def page_of(door: Door, path: str) -> str:
    answer = await Visitor(door).get(path)
    assert answer.status == 200
    return answer.body.decode()


def words_of(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def told(page: str) -> list[Decimal]:
    """The dollars of the sum's lines, the total last."""
    [table] = re.findall(r'aria-label="What was added to the balance">(.*?)</table>', page, re.DOTALL)
    return [D(sign.replace("−", "-") + text.replace(",", "")) for sign, text in re.findall(r">(−?)\$([\d.,]+)<", table)]


@pytest.mark.parametrize(("method", "amount"), METHODS)
async def test_an_open_receipt_is_all_it_takes_to_pay(door: Door, method: str, amount: str) -> None:
    _, invoice_id, path = await topup(door, method, amount)
    answer = await Visitor(door).get(path)
    page, words = answer.body.decode(), words_of(answer.body.decode())
    invoice = door.rig.btcpay.invoices[invoice_id]
    for part in (
        "Waiting for your payment",
        "Paid to Satmeter",
        f"${amount}.00",
        "Open in a wallet",
        "Copy the amount",
        invoice_id,
        "by btcpay",
    ):
        assert part in words, part
    assert f'data-copy="{invoice.destination}"' in page
    assert f'href="{invoice.payment_link}"' in page
    assert "data-countdown" in page
    assert f"{invoice.total.normalize():f} " in words
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert not answer.cookies
    assert re.findall(r" (?:style|on\w+)=|<script>|hx-on", page) == []
    [picture] = re.findall(r'src="(/receipts/[^"]+qr\.svg[^"]*)"', page)
    svg = await Visitor(door).get(unescape(picture))
    assert (svg.headers["content-type"], svg.body.decode().count("style=")) == ("image/svg+xml", 0)


@pytest.mark.parametrize(("method", "amount"), METHODS)
async def test_a_part_is_shown_with_what_is_to_go_to_the_last_unit(door: Door, method: str, amount: str) -> None:
    _, invoice_id, path = await topup(door, method, amount)
    total = door.rig.btcpay.invoices[invoice_id].total
    payment = door.rig.btcpay.pay(invoice_id, share=D("0.4"), settled=False)
    await door.rig.poll()
    page = words_of(await page_of(door, path))
    found = re.search(r"Part of it has arrived: ([\d.]+) of ([\d.]+) [\w-]+; ([\d.]+) [\w-]+ to go", page)
    assert found, page[:600]
    came, asked, to_go = map(D, found.groups())
    assert (came + to_go, asked) == (total, total)
    assert f"Send exactly {to_go.normalize():f} " in page
    assert payment.id in page
    assert not [word for word in WIRE_WORDS if word in page]


async def test_a_part_that_expired_is_shown_and_its_worth_adds_up(door: Door) -> None:
    _, invoice_id, path = await topup(door, "btc", "100")
    door.rig.btcpay.pay(invoice_id, share=D("0.5"))
    door.rig.btcpay.change(invoice_id, status=InvoiceStatus.EXPIRED, additional_status=AdditionalStatus.PAID_PARTIAL)
    await door.rig.poll()
    page = await page_of(door, path)
    assert "Its time is over. Part of it has arrived:" in words_of(page)
    assert "qr.svg" not in page
    *lines, total = told(page)
    assert sum(lines) == total == await balance_of(door, path)


async def balance_of(door: Door, path: str) -> Decimal:
    [(nusd,)] = door.rig.sql("SELECT sum(posted_nusd)::bigint FROM account")
    return D(nusd) / 10**9


@pytest.mark.parametrize(("method", "amount"), METHODS)
@pytest.mark.parametrize("fee", ["0.000002", "0", "-0.00000003"])
async def test_the_sum_adds_up_with_the_network_fee_and_the_bonus(
    door: Door, method: str, amount: str, fee: str
) -> None:
    _, invoice_id, path = await topup(door, method, amount)
    payment = door.rig.btcpay.pay(invoice_id)
    with_fee = replace(payment, value=payment.value + D(fee), fee=D(fee))
    door.rig.btcpay.change(invoice_id, payments=(with_fee,), fee=D(fee))
    await door.rig.poll()
    page = await page_of(door, path)
    assert "Paid. Thank you." in words_of(page)
    lines = told(page)
    if len(lines) > 1:
        *parts, total = lines
        credited = re.search(r"<td>Credited</td>.*?>\$([\d.]+)<", page, re.DOTALL)
        parts = [each for each in parts if credited is None or each != D(credited[1])] if credited else parts
        assert sum(parts) == total
    assert lines[-1] == await balance_of(door, path)
    assert ("Network fee" in page) == (D(fee) > 0)
    assert ("Bonus, 5 %" in page) == (method == "btc-lightning")


async def test_late_and_over_are_said_in_words_and_credited_in_the_sum(door: Door) -> None:
    _, late_id, late_path = await topup(door, "ltc", "20")
    door.rig.btcpay.change(late_id, status=InvoiceStatus.EXPIRED)
    door.rig.btcpay.pay(late_id, late=True)
    await door.rig.poll()
    page = words_of(await page_of(door, late_path))
    assert "It was paid after its time was over." in page
    assert "at the lower of the rate then and the rate when it came" in page
    _, over_id, over_path = await topup(door, "ltc", "20")
    door.rig.btcpay.pay(over_id, share=D("1.25"))
    await door.rig.poll()
    page = words_of(await page_of(door, over_path))
    assert "More came than was asked: all of it is credited." in page
    assert "Added to the balance $25." in page


async def test_what_waits_says_for_how_many_confirmations_and_what_was_replaced_does_not_count(door: Door) -> None:
    for method, amount, words in (
        ("btc", "20", "1 confirmation, about 10 minutes"), ("btc", "2000", "2 confirmations, about 20 minutes"),
        ("ltc", "20", "1 confirmation, about 2.5 minutes"), ("xmr", "20", "10 confirmations, about 20 minutes"),
    ):  # fmt: skip
        _, invoice_id, path = await topup(door, method, amount)
        payment = door.rig.btcpay.pay(invoice_id, settled=False)
        await door.rig.poll()
        assert f"has arrived, and waits for {words}" in words_of(await page_of(door, path))
        door.rig.btcpay.change(
            invoice_id, status=InvoiceStatus.INVALID, payments=(replace(payment, status=PaymentStatus.INVALID),)
        )
        await door.rig.poll()
        page = words_of(await page_of(door, path))
        assert "was not confirmed, and does not count" in page
        assert "did not confirm: it was replaced" in page
        assert "Added to the balance" not in page


async def test_the_stream_tells_what_changed_and_ends_when_nothing_can_happen(door: Door) -> None:
    _, invoice_id, path = await topup(door, "btc-lightning", "5")
    page = await page_of(door, path)
    [live] = re.findall(r'hx-sse:connect="([^"]+)"', page)
    door.rig.btcpay.pay(invoice_id)
    await door.rig.poll()
    answer = await door.rig.client.get(unescape(live))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["content-security-policy"] == POLICY
    said = answer.text
    assert "Paid. Thank you." in said
    assert "event: over" in said
    assert "hx-sse:connect" not in await page_of(door, path)


async def test_the_receipts_data_and_its_page_tell_the_same(door: Door) -> None:
    customer, invoice_id, path = await topup(door, "xmr", "30")
    payment = door.rig.btcpay.pay(invoice_id)
    door.rig.btcpay.change(
        invoice_id, payments=(replace(payment, value=payment.value + D("0.000002"), fee=D("0.000002")),)
    )
    await door.rig.poll()
    data = exact(await door.rig.client.get(f"/topup/receipt/{invoice_id}", headers=customer.key))
    [told_payment] = data["payments"]
    page = words_of(await page_of(door, path))
    assert f"{told_payment['value'].normalize():f} XMR" in page
    assert f"−{told_payment['fee'].normalize():f} XMR" in page


@dataclass(frozen=True)
class Story:
    """Payments as shares of what was asked, in time and late; whether the time ran out; and what the page says of it."""

    says: str
    in_time: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    runs_out: bool = False
    fee: str = "0"
    is_payable: bool = False


STORIES = {
    "unpaid": Story("Waiting for your payment.", is_payable=True),
    "part-paid": Story("Part of it has arrived: {of}; {to_go} to go.", ("0.4",), is_payable=True),
    "part-paid twice, with a fee": Story("Part of it has arrived: {of}; {to_go} to go.", ("0.3", "0.2"), fee="0.000002", is_payable=True),
    "settled": Story("Paid. Thank you.", ("1",)),
    "settled with a fee": Story("Paid. Thank you.", ("1",), fee="0.000002"),
    "settled by several": Story("Paid. Thank you.", ("0.5", "0.25", "0.25"), fee="0.000002"),
    "over-paid": Story("Paid. More came than was asked: all of it is credited.", ("1.25",)),
    "over-paid by several": Story("Paid. More came than was asked: all of it is credited.", ("0.8", "0.7"), fee="0.000002"),
    "late": Story("It was paid after its time was over.", late=("1",), runs_out=True, fee="0.000002"),
    "late in part": Story("Its time is over. Part of it has arrived: {of}.", late=("0.5",), runs_out=True),
    "late to the rest": Story("It was paid after its time was over.", ("0.5",), ("0.5",), runs_out=True, fee="0.000002"),
    "expired": Story("Its time is over, and nothing has arrived.", runs_out=True),
    "expired with a part": Story("Its time is over. Part of it has arrived: {of}.", ("0.5",), runs_out=True, fee="0.000002"),
}  # fmt: skip


async def played(door: Door, invoice_id: str, story: Story) -> None:
    """All that happens to the invoice in the story, and we hear of it."""
    btcpay, fee = door.rig.btcpay, D(story.fee)
    for is_late, share in [*((False, each) for each in story.in_time), *((True, each) for each in story.late)]:
        btcpay.pay(invoice_id, share=D(share), late=is_late)
    invoice = btcpay.invoices[invoice_id]
    paid = tuple(replace(each, value=each.value + fee, fee=fee) for each in invoice.payments)
    status = InvoiceStatus.EXPIRED if story.runs_out else invoice.status
    # Fees come on top of what is asked, so that shares stay what the story says.
    asked = replace(invoice, total=invoice.total + fee * len(paid), payments=paid, fee=fee, status=status)
    btcpay.invoices[invoice_id] = replace(asked, paid=sum((each.value for each in paid), D(0)))
    await door.rig.poll()


def sum_of(page: str) -> list[tuple[str, Decimal]]:
    """The lines of what was added: their names and dollars."""
    found = re.search(r'aria-label="What was added to the balance">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr><td[^>]*>(.*?)</td>.*?(−?)\$([\d.,]+)</td></tr>", found[1] if found else "", re.DOTALL)
    return [(words_of(name), D(sign.replace("−", "-") + dollars.replace(",", ""))) for name, sign, dollars in rows]


@pytest.mark.parametrize(("method", "amount"), METHODS)
async def test_both_pages_of_a_payment_tell_it_alike_and_add_up_from_its_payments(
    door: Door, method: str, amount: str
) -> None:
    for name, story in STORIES.items():
        try:
            await told_rightly(door, method, amount, story)
        except AssertionError as error:
            error.add_note(f"the story: {name}")
            raise


async def told_rightly(door: Door, method: str, amount: str, story: Story) -> None:
    customer, invoice_id, path = await topup(door, method, amount)
    await played(door, invoice_id, story)
    page = await page_of(door, path)
    visitor = Visitor(door)
    await visitor.sign_in(customer.credit_id)
    [(topup_id, account_id, asked_units)] = door.rig.sql(
        "SELECT id, account_id, total_coin_units FROM topup WHERE invoice_id = %s", invoice_id
    )
    own = (await visitor.get(f"/console/topups/{topup_id}")).body.decode()
    assert drawing_of(own, f"/console/topups/{topup_id}") == drawing_of(page, path)

    places, coin = (
        {"btc-lightning": 11, "btc": 11, "xmr": 12}.get(method, 8),
        {"xmr": "XMR", "ltc": "LTC", "lbtc": "L-BTC"}.get(method, "BTC"),
    )
    payments = door.rig.sql(
        "SELECT payment_id, value_coin_units, fee_coin_units FROM payment WHERE topup_id = %s", topup_id
    )
    values, fees = ([D(each[place]).scaleb(-places) for each in payments] for place in (1, 2))
    asked, words = D(asked_units).scaleb(-places), words_of(page)
    came, to_go = plain(sum(values, D(0))), max(D(0), asked - sum(values, D(0)))
    assert story.says.format(of=f"{came} of {plain(asked)} {coin}", to_go=f"{plain(to_go)} {coin}") in words
    assert (f"Send exactly {plain(to_go)} {coin}" in words, "qr.svg" in page) == (story.is_payable, story.is_payable)
    for (payment_id, *_), value in zip(payments, values, strict=True):
        assert payment_id in page
        assert f"{plain(value)} {coin}" in words
    assert (f"Received {came} {coin}" in words) == (len(payments) > 1)

    said = exact(await door.rig.client.get(f"/topup/status/{invoice_id}", headers=customer.key))
    lines, (total, credited, bonus) = (
        sum_of(page),
        (said["credited_usd"] + said["bonus_usd"], said["credited_usd"], said["bonus_usd"]),
    )
    worth = sum((value - fee for value, fee in zip(values, fees, strict=True)), D(0)) * said["rate_usd"]
    # What came in time is credited when the invoice is full or its time is over.
    assert abs(credited - worth * (not story.is_payable)) <= D("0.01")
    [(posted_nusd,)] = door.rig.sql("SELECT sum(posted_nusd)::bigint FROM account WHERE id = %s", account_id)
    assert total == D(posted_nusd).scaleb(-9)
    if total == 0:
        assert lines == []
        return
    (last, shown_total), parts = lines[-1], [line for line in lines[:-1] if line[0] != "Credited"]
    assert (last, shown_total) == ("Added to the balance", total)
    assert sum(dollars for _, dollars in parts) == total
    assert sum(name.startswith("Payment ") for name, _ in parts) == len(payments)
    assert sum(dollars for name, dollars in parts if name.startswith("Bonus")) == bonus
    assert [name for name, _ in parts].count("Network fee") == (D(story.fee) > 0)
    assert (f"−{plain(sum(fees, D(0)))} {coin}" in words) == (D(story.fee) > 0)
    assert not [word for word in WIRE_WORDS if word in words]


def drawing_of(page: str, place: str) -> str:
    """The payment as it is drawn, wherever it stands; seconds pass between two looks at it."""
    begin, end = (
        page.index('<div class="banner">') if '<div class="banner">' in page else page.index('id="receipt"'),
        page.index("noprint"),
    )
    return page[begin:end].replace(place, "")[: page[begin:end].replace(place, "").rindex("</section>")]


def plain(value: Decimal) -> str:
    """Without an exponent or zeros at its end."""
    return f"{value.normalize():f}" if value else "0"


@pytest.mark.parametrize("what", ["", "/qr.svg", "/live"])
async def test_an_address_that_was_spoilt_opens_nothing(door: Door, what: str) -> None:
    _, _, path = await topup(door, "btc", "20")
    spoilt = path[:-1] + ("A" if path[-1] != "A" else "B")
    for bad in (spoilt, "/receipts/x", "/receipts/" + "A" * 64):
        assert (await Visitor(door).get(bad + what)).status == 404


async def test_the_front_page_sells_calls_and_opens_an_account(door: Door) -> None:
    visitor = Visitor(door)
    page = (await visitor.get("/")).body.decode()
    words = words_of(page)
    for part in (
        "Satmeter: models by the call",
        "Bitcoin Lightning from $0.10 5 % on top",
        "Monero from $5.00",
        "No model has a price here yet",
    ):
        assert part in words, part
    opened = await visitor.submit("/", "/console/open")
    assert re.search(r"<code>[0-9a-f-]{36}</code>", opened.body.decode())
    for link in set(re.findall(r'href="(/[^"#]*)"', page)):
        assert (await visitor.get(link)).status in (200, 303), link
