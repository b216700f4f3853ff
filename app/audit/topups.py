"""What top-ups promise: what was credited is what was paid, by a payment that counts once."""

from decimal import Decimal
from typing import Final

from app.audit.check import Check, values
from app.audit.waited import in_vain
from app.kernel.money import COIN_PLACES, CURRENCIES
from app.topups.methods import METHODS

_TOPUP_ENTRY: Final = """
    (SELECT account_id, id, kind, reference, contra, amount_nusd, split_part(reference, '/', 1) AS topup_id,
            sum(amount_nusd) OVER (PARTITION BY account_id, kind, split_part(reference, '/', 1) ORDER BY id) - amount_nusd AS before
     FROM entry WHERE kind IN ('topup', 'bonus'))"""
"""Entries of top-ups with the top-up they name, and what that top-up had been given before."""


_CURRENCY_UNITS: Final = values(
    (code, Decimal(1).scaleb(9 - (8 if code == "SATS" else currency.places))) for code, currency in CURRENCIES.items()
)
_COIN_UNITS: Final = values((method.id, Decimal(1).scaleb(9 - COIN_PLACES[method.coin])) for method in METHODS.values())
_VALUED: Final = f"""
    (SELECT t.*, coin_unit, floor(usd_rate * 10) + 1 AS dust_nusd,
            CASE t.currency WHEN 'USD' THEN amount_units ELSE floor(amount_units * currency_unit * usd_rate) END AS face_nusd
     FROM (SELECT account_id, id, method, currency, amount_units, status, additional_status, coalesce(review, reviewed) AS seen,
                  credited_nusd, settled_at,
                  CASE currency WHEN 'USD' THEN rate ELSE usd_per_coin END AS usd_rate FROM topup) t
     LEFT JOIN (VALUES {_CURRENCY_UNITS}) AS f (currency, currency_unit) ON f.currency = t.currency
     LEFT JOIN (VALUES {_COIN_UNITS}) AS c (method, coin_unit) ON c.method = t.method)"""
"""Top-ups with what they ask for in nano-USD. A unit times USD per whole coin gives nano-USD; dust is what
crediting forgives a full payment."""

_PAID: Final = """
    (SELECT account_id, topup_id, sum(worth_nusd) AS worth_nusd, count(*) FILTER (WHERE status = 'Settled') AS settled,
            coalesce(sum(worth_nusd) FILTER (WHERE status = 'Settled'), 0) AS settled_nusd
     FROM payment GROUP BY 1, 2)"""

TOPUPS: Final = (
    Check(
        "topup_credit_is_sum_of_entries",
        "What a top-up says it credited is the sum of its entries.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, coalesce(e.total, 0) AS recomputed
            FROM topup t LEFT JOIN (SELECT account_id, topup_id, sum(amount_nusd) AS total FROM {_TOPUP_ENTRY} e
                                    WHERE kind = 'topup' GROUP BY 1, 2) e
                                ON e.account_id = t.account_id AND e.topup_id = t.id::text
            WHERE t.credited_nusd <> coalesce(e.total, 0)""",
        is_money=True,
    ),
    Check(
        "topup_bonus_is_sum_of_entries",
        "What a top-up says it gave as a bonus is the sum of its bonus entries.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.bonus_nusd AS recorded, coalesce(e.total, 0) AS recomputed
            FROM topup t LEFT JOIN (SELECT account_id, topup_id, sum(amount_nusd) AS total FROM {_TOPUP_ENTRY} e
                                    WHERE kind = 'bonus' GROUP BY 1, 2) e
                                ON e.account_id = t.account_id AND e.topup_id = t.id::text
            WHERE t.bonus_nusd <> coalesce(e.total, 0)""",
        is_money=True,
    ),
    Check(
        "topup_entry_has_its_topup",
        "Every entry of a top-up or a bonus names a top-up of the same account.",
        f"""SELECT e.account_id || '/' || e.id AS subject, e.reference AS recorded, 'a top-up of this account' AS recomputed
            FROM {_TOPUP_ENTRY} e LEFT JOIN topup t ON t.account_id = e.account_id AND t.id::text = e.topup_id
            WHERE t.id IS NULL""",
    ),
    Check(
        "topup_entries_form_a_chain",
        "The reference of a top-up's entry names what the top-up had been given before it.",
        f"""SELECT account_id || '/' || id AS subject, reference AS recorded, topup_id || '/' || before AS recomputed
            FROM {_TOPUP_ENTRY} e WHERE reference <> topup_id || '/' || before""",
    ),
    Check(
        "topup_entry_comes_from_its_backend",
        "The money of a top-up comes from the house account of its backend and method.",
        f"""SELECT e.account_id || '/' || e.id AS subject, e.contra AS recorded, t.backend || ':' || t.method AS recomputed
            FROM {_TOPUP_ENTRY} e JOIN topup t ON t.account_id = e.account_id AND t.id::text = e.topup_id
            WHERE e.kind = 'topup' AND e.contra <> t.backend || ':' || t.method""",
    ),
    Check(
        "review_entry_has_its_review",
        "An adjustment that a review decided names a reviewed top-up of the same account.",
        """SELECT e.account_id || '/' || e.id AS subject, e.reference AS recorded, 'a reviewed top-up of this account' AS recomputed
           FROM entry e LEFT JOIN topup t ON t.account_id = e.account_id AND t.id::text = split_part(e.reference, '/', 2)
           WHERE e.kind = 'adjustment' AND starts_with(e.reference, 'review/') AND t.reviewed IS NULL""",
    ),
    Check(
        "topup_bonus_is_its_share",
        "A bonus is its percentage of what was credited, rounded down.",
        """SELECT account_id || '/' || id AS subject, bonus_nusd AS recorded,
                  floor(credited_nusd::numeric * bonus_percent / 100) AS recomputed
           FROM topup WHERE bonus_nusd <> floor(credited_nusd::numeric * bonus_percent / 100)""",
        is_money=True,
    ),
    Check(
        "bonus_percent_is_what_the_method_gives",
        "No top-up has a higher bonus than its method gives.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.bonus_percent AS recorded, coalesce(m.percent, 0) AS recomputed
            FROM topup t LEFT JOIN (VALUES {values((method.id, method.bonus_percent) for method in METHODS.values())})
                                AS m (method, percent) ON m.method = t.method
            WHERE t.bonus_percent NOT BETWEEN 0 AND coalesce(m.percent, 0)""",
    ),
    Check(
        "credit_is_backed_by_payments",
        "A top-up credited no more than its payments are worth, or its face where they miss it by dust.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, coalesce(p.worth_nusd, 0) AS recomputed
            FROM {_VALUED} t LEFT JOIN {_PAID} p ON p.account_id = t.account_id AND p.topup_id = t.id
            WHERE t.credited_nusd > coalesce(p.worth_nusd, 0)
              AND NOT (t.credited_nusd = coalesce(t.face_nusd, 0) AND p.worth_nusd + t.dust_nusd >= t.face_nusd) IS TRUE""",
        is_money=True,
    ),
    Check(
        "credited_topup_has_a_settled_payment",
        "A top-up that credited something has a settled payment, or is or was shown to a person.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, 0 AS recomputed
            FROM topup t LEFT JOIN {_PAID} p ON p.account_id = t.account_id AND p.topup_id = t.id
            WHERE t.credited_nusd > 0 AND coalesce(t.review, t.reviewed) IS NULL AND coalesce(p.settled, 0) = 0""",
        is_money=True,
    ),
    Check(
        "only_settled_payments_are_worth_something",
        "A payment is valued once it settled; one that fell back after that is or was shown to a person.",
        """SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.worth_nusd AS recorded, 0 AS recomputed
           FROM payment p LEFT JOIN topup t ON t.account_id = p.account_id AND t.id = p.topup_id
           WHERE p.worth_nusd > 0 AND p.status <> 'Settled' AND coalesce(t.review, t.reviewed) IS NULL""",
        is_money=True,
    ),
    Check(
        "payment_is_worth_its_coins",
        "A payment is worth no more than its coins less the fee, at the top-up's rate (a unit of rounding each).",
        f"""SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.worth_nusd AS recorded,
                   floor((p.value_coin_units - p.fee_coin_units) * t.coin_unit * t.usd_rate) AS recomputed
            FROM payment p JOIN {_VALUED} t ON t.account_id = p.account_id AND t.id = p.topup_id
            WHERE p.worth_nusd > 0
              AND p.worth_nusd > coalesce((p.value_coin_units - p.fee_coin_units + 2) * t.coin_unit * t.usd_rate, 0)""",
        is_money=True,
    ),
    Check(
        "settled_payments_are_valued",
        "A settled payment that came in time is worth at least its coins less the fee, unless a person marked the invoice.",
        f"""SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.worth_nusd AS recorded,
                   floor((p.value_coin_units - p.fee_coin_units) * t.coin_unit * t.usd_rate) AS recomputed
            FROM payment p JOIN {_VALUED} t ON t.account_id = p.account_id AND t.id = p.topup_id
            WHERE p.status = 'Settled' AND NOT p.late AND t.seen IS NULL AND t.status IN ('Settled', 'Expired')
              AND p.worth_nusd < floor((p.value_coin_units - p.fee_coin_units) * t.coin_unit * t.usd_rate)""",
        is_money=True,
    ),
    Check(
        "settled_payments_are_credited",
        "What settled payments are worth was credited, or the face where they exceed it by dust.",
        f"""SELECT t.account_id || '/' || t.id AS subject, t.credited_nusd AS recorded, p.settled_nusd AS recomputed
            FROM {_VALUED} t JOIN {_PAID} p ON p.account_id = t.account_id AND p.topup_id = t.id
            WHERE t.credited_nusd < p.settled_nusd
              AND NOT (t.credited_nusd = t.face_nusd AND p.settled_nusd - t.dust_nusd <= t.face_nusd) IS TRUE""",
        is_money=True,
    ),
    Check(
        "settled_topup_is_credited",
        "A top-up that the backend settled an hour ago has credited what it asked for, or is or was shown to a person.",
        f"""SELECT account_id || '/' || id AS subject, credited_nusd AS recorded, face_nusd AS recomputed FROM {_VALUED} t
            WHERE status = 'Settled' AND additional_status <> 'Marked' AND seen IS NULL AND credited_nusd < face_nusd
              AND coalesce(settled_at, '-infinity') < now() - interval '1 hour'""",
        is_money=True,
    ),
    Check(
        "payment_counts_for_one_topup",
        "No payment of a backend is worth something to two top-ups.",
        """SELECT t.backend || '/' || p.payment_id AS subject, count(*) AS recorded, 1 AS recomputed
           FROM payment p JOIN topup t ON t.account_id = p.account_id AND t.id = p.topup_id
           WHERE p.worth_nusd > 0 GROUP BY t.backend, p.payment_id HAVING count(*) > 1""",
    ),
    Check(
        "payment_has_its_topup",
        "Every payment belongs to a top-up.",
        """SELECT p.account_id || '/' || p.topup_id || '/' || p.payment_id AS subject, p.topup_id AS recorded, NULL AS recomputed
           FROM payment p LEFT JOIN topup t ON t.account_id = p.account_id AND t.id = p.topup_id WHERE t.id IS NULL""",
    ),
    Check(
        "invoice_of_topup_is_known",
        "A top-up's invoice is looked up to this top-up, and so to no other.",
        """SELECT t.account_id || '/' || t.id AS subject, t.backend || '/' || t.invoice_id AS recorded,
                  i.account_id || '/' || i.topup_id AS recomputed
           FROM topup t LEFT JOIN topup_invoice i ON i.backend = t.backend AND i.invoice_id = t.invoice_id
           WHERE t.invoice_id IS NOT NULL AND (i.account_id, i.topup_id) IS DISTINCT FROM (t.account_id, t.id)""",
    ),
    Check(
        "known_invoice_has_its_topup",
        "An invoice that is looked up leads to a top-up of this backend that has an invoice"
        " (a repeat after a lost answer may have made it a second one, which nobody is shown).",
        """SELECT i.backend || '/' || i.invoice_id AS subject, i.account_id || '/' || i.topup_id AS recorded, t.invoice_id AS recomputed
           FROM topup_invoice i
           LEFT JOIN topup t ON t.account_id = i.account_id AND t.id = i.topup_id AND t.backend = i.backend
           WHERE t.invoice_id IS NULL""",
    ),
    Check(
        "topup_shows_its_address",
        "The address or Lightning invoice that a top-up shows was told by its backend.",
        """SELECT t.account_id || '/' || t.id AS subject, t.destination AS recorded, 'what the backend told' AS recomputed
           FROM topup t LEFT JOIN topup_address d ON d.account_id = t.account_id AND d.topup_id = t.id AND d.destination = t.destination
           WHERE t.destination <> '' AND d.topup_id IS NULL""",
    ),
    Check(
        "addresses_change_after_payments_only",
        "A backend tells a top-up another address after a payment, and at no other time.",
        """SELECT d.account_id || '/' || d.topup_id AS subject, d.count || ' addresses' AS recorded,
                  coalesce(p.count, 0) || ' payments' AS recomputed
           FROM (SELECT account_id, topup_id, count(*) AS count FROM topup_address GROUP BY 1, 2) d
           JOIN topup t ON t.account_id = d.account_id AND t.id = d.topup_id
           LEFT JOIN (SELECT account_id, topup_id, count(*) AS count FROM payment GROUP BY 1, 2) p
                  ON p.account_id = d.account_id AND p.topup_id = d.topup_id
           WHERE d.count > 1 + coalesce(p.count, 0)""",
    ),
    Check(
        "open_topup_is_watched",
        "A top-up that can still be paid will be asked about again, and was not forgotten for a day.",
        f"""SELECT account_id || '/' || id AS subject, coalesce(next_check_at::text, 'never again') AS recorded,
                  'until ' || watch_until AS recomputed
           FROM topup WHERE status <> 'Failed' AND watch_until > now()
                        AND {in_vain("check top-ups", "coalesce(next_check_at, '-infinity') + interval '1 day'")}""",
    ),
    Check(
        "webhooks_are_looked_into",
        "A webhook about an invoice we know is looked into within the hour.",
        f"""SELECT d.backend || '/' || d.delivery_id || '/' || d.type AS subject, 'waiting since ' || d.received_at AS recorded,
                  'processed' AS recomputed
           FROM webhook_delivery d JOIN topup_invoice i ON i.backend = d.backend AND i.invoice_id = d.invoice_id
           WHERE d.processed_at IS NULL AND {in_vain("look into webhooks", "d.received_at + interval '1 hour'")}""",
    ),
)
