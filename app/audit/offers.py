"""What offers promise: one open at a time, each a top-up of its account, and a proof of payment leads to whose it is."""

from typing import Final

from app.audit.check import Check, Proof, Secrets
from app.kernel.db import Row
from app.keys.verify import KeyOwner
from app.offers.made import offer_proof

OFFERS: Final = (
    Check(
        "offer_is_a_topup",
        "An offer that can be paid is a Lightning top-up of the same account.",
        """SELECT o.account_id || '/' || o.id AS subject, o.topup_id AS recorded, 'a Lightning top-up of this account' AS recomputed
           FROM offer o LEFT JOIN topup t ON t.account_id = o.account_id AND t.id = o.topup_id AND t.method = 'btc-lightning'
           WHERE o.payment_hash IS NOT NULL AND t.id IS NULL""",
    ),
    Check(
        "consumed_offer_was_paid",
        "An offer whose proof was consumed has a settled payment on its top-up, or a person saw to it.",
        """SELECT o.account_id || '/' || o.id AS subject, 'consumed by ' || o.consumed_by AS recorded, 'a settled payment' AS recomputed
           FROM offer o LEFT JOIN topup t ON t.account_id = o.account_id AND t.id = o.topup_id
           LEFT JOIN (SELECT account_id, topup_id, count(*) AS settled FROM payment WHERE status = 'Settled' GROUP BY 1, 2) p
                  ON p.account_id = o.account_id AND p.topup_id = o.topup_id
           WHERE o.consumed_at IS NOT NULL AND coalesce(p.settled, 0) = 0 AND coalesce(t.review, t.reviewed) IS NULL""",
    ),
    Check(
        "one_offer_of_a_key_is_open",
        "A key has one open offer at most.",
        """SELECT account_id || '/' || key_id AS subject, count(*) AS recorded, 1 AS recomputed FROM offer
           WHERE closed_at IS NULL GROUP BY account_id, key_id HAVING count(*) > 1""",
    ),
    Check(
        "proof_leads_to_its_offer",
        "A payment hash leads to the offer that has it, and the offer to it.",
        """SELECT encode(r.payment_hash, 'hex') AS subject, r.account_id || '/' || r.offer_id AS recorded,
                  'an offer with this hash' AS recomputed
           FROM proof_ref r LEFT JOIN offer o ON o.account_id = r.account_id AND o.id = r.offer_id
           WHERE o.payment_hash IS DISTINCT FROM r.payment_hash
           UNION ALL
           SELECT encode(o.payment_hash, 'hex'), o.account_id || '/' || o.id, 'a hash that leads to this offer'
           FROM offer o LEFT JOIN proof_ref r ON r.payment_hash = o.payment_hash
           WHERE o.payment_hash IS NOT NULL AND (r.account_id, r.offer_id) IS DISTINCT FROM (o.account_id, o.id)""",
    ),
)


def _is_theirs(secrets: Secrets, found: Row) -> bool:
    owner = KeyOwner(found["account_id"], found["key_id"])
    made = offer_proof(secrets.pepper, bytes(found["payment_hash"]), owner, found["offer_id"])
    return bytes(found["proof"]) == made


ALIASES: Final = (
    Proof(
        "alias_is_of_its_key",
        "A proof of payment stands for the key that its offer was made for.",
        """SELECT encode(r.payment_hash, 'hex') AS subject, r.account_id, r.offer_id, r.payment_hash, r.proof, o.key_id
           FROM proof_ref r JOIN offer o ON o.account_id = r.account_id AND o.id = r.offer_id""",
        _is_theirs,
        broken="bound to another",
        whole="bound to this",
    ),
)
