"""What only our secrets can tell: that kept ones open where they stand, and that credentials and acts were written by us."""

from typing import Final

from app.admin.acts import proof_of
from app.audit.check import Proof, Secrets
from app.autotopup import connect
from app.kernel.db import Row
from app.kernel.security import UnsealError, equal
from app.keys import issue
from app.keys.proof import event_proof
from app.keys.verify import CREDENTIAL, proof_of_credential
from app.notices.address import sealed_as as notice_sealed_as


def _opens(secrets: Secrets, sealed: str, name: str) -> bool:
    try:
        secrets.sealer.open(sealed, name)
    except UnsealError:
        return False
    return True


def _key_opens(secrets: Secrets, row: Row) -> bool:
    return _opens(secrets, row["sealed_secret"], issue.sealed_as(row["account_id"], row["id"]))


def _wallet_opens(secrets: Secrets, row: Row) -> bool:
    return _opens(secrets, row["sealed_secret"], connect.sealed_as(row["account_id"]))


def _address_opens(secrets: Secrets, row: Row) -> bool:
    return all(
        _opens(secrets, row[f"sealed_{what}"], notice_sealed_as(row["account_id"], what)) for what in ("url", "secret")
    )


def _is_bound(secrets: Secrets, row: Row) -> bool:
    return row["proof"] is not None and equal(bytes(row["proof"]), proof_of_credential(secrets.pepper, row))


def _is_noted_by_us(secrets: Secrets, row: Row) -> bool:
    return equal(bytes(row["proof"]), event_proof(secrets.pepper, row))


def _is_ours(secrets: Secrets, row: Row) -> bool:
    return row["proof"] is not None and equal(bytes(row["proof"]), proof_of(secrets.pepper, row))


# Saved answers are not looked at: they are forgotten in two days, and one that does not open is refused with a reason.
SEALS: Final = (
    Proof(
        "kept_key_opens",
        "A key that is kept for showing opens where it stands: no sealing key is missing, and no secret was moved.",
        """SELECT account_id || '/' || id AS subject, account_id, id, sealed_secret FROM api_key
           WHERE sealed_secret IS NOT NULL""",
        _key_opens, broken="does not open", whole="opens",
    ),
    Proof(
        "wallet_secret_opens",
        "A connected wallet's secret opens where it stands.",
        "SELECT account_id::text AS subject, account_id, sealed_secret FROM nwc_connection",
        _wallet_opens, broken="does not open", whole="opens",
    ),
    Proof(
        "notice_address_opens",
        "Where an account's notices go was written by us, and what signs them: nobody who can only write here has them sent elsewhere.",
        "SELECT account_id::text AS subject, account_id, sealed_url, sealed_secret FROM notice_address WHERE sealed_url IS NOT NULL",
        _address_opens, broken="does not open", whole="opens",
    ),
    Proof(
        "credential_is_bound",
        "A secret's hash leads to the account and key that it was made for.",
        f"SELECT kind || ' of ' || account_id || coalesce('/' || key_id, '') AS subject, {CREDENTIAL} FROM credential",
        _is_bound, broken="bound to another", whole="bound to this",
    ),
    Proof(
        "credential_event_is_ours",
        "What was done with an account's credentials was written down by us, as it stands.",
        """SELECT account_id || '/' || id AS name, account_id, id, act, shown_by, subject, proof FROM credential_event""",
        _is_noted_by_us, broken="not written by us", whole="written by us",
    ),
    Proof(
        "act_is_an_operator_s",
        "An operator's act was written by us, as it stands.",
        "SELECT id, admin, act, subject, reason, amount_nusd, before, after, request_id, proof FROM admin_log",
        _is_ours, broken="not written by us", whole="written by us",
    ),
    Proof(
        "review_has_its_act",
        "An adjustment that a review decided stands in the operators' log, with its amount.",
        """SELECT e.account_id || '/' || e.id AS subject, l.id FROM entry e
           LEFT JOIN admin_log l ON l.subject = e.account_id || substr(e.reference, 7) AND l.amount_nusd = e.amount_nusd
           WHERE e.kind = 'adjustment' AND starts_with(e.reference, 'review/')""",
        lambda _, row: row["id"] is not None, broken="no act", whole="an act of this amount",
    ),
)  # fmt: skip
