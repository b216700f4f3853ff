"""The receipt: what came and what is to go, to the last unit; a sum that adds up; words for people; nothing of its own runs."""

import re
from dataclasses import replace
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
