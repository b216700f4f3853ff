"""What is sealed, and how: the digest that stands for a row, and the MACs that chain one place of a chain to the next.

A chain belongs to an account (`entries`, `key/…`, `credit_id/…`) or to the house (`prices/…`, rules, tokens, operators'
acts). Whoever can only write to the database, be it as its owner, cannot make a link: the key comes from the pepper.
"""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from app.kernel.security import Pepper

HOUSE: Final = uuid.UUID(int=0)
"""The account that the house's own chains stand under."""
ENTRIES: Final = "entries"
LINK_BYTES: Final = 16
NO_LINK: Final = bytes(LINK_BYTES)
NO_CALL: Final = bytes(LINK_BYTES)
"""In place of a call's digest: for an entry that is of none, or whose call was dropped before it was sealed."""
LINK_BY_LINK: Final = 1
"""The form of a seal whose `links` are MACs, one of each place. Entries were sealed so at first."""
AT_ONCE: Final = 2
"""The form of a seal whose `links` are its places' digests and one MAC behind them, over all of it."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """Some places of one chain, as a row of `seal`."""

    account_id: uuid.UUID
    chain: str
    number: int
    links: bytes
    kept: bytes
    form: int = LINK_BY_LINK

    @property
    def count(self) -> int:
        return len(self.links) // LINK_BYTES - (self.form == AT_ONCE)

    @property
    def last_link(self) -> bytes:
        return self.links[-LINK_BYTES:]

    def digest(self) -> bytes:
        """What a run's MAC says of this row; the SQL below says the same."""
        named = f"{self.account_id}/{self.chain}/{self.number}/{self.count}/"
        return hashlib.sha256(named.encode() + self.links + self.kept).digest()


DIGEST_SQL: Final = """
    sha256(convert_to(concat(account_id, '/', chain, '/', number, '/', count, '/'), 'UTF8') || links || kept)"""
IN_ORDER: Final = 'account_id, chain COLLATE "C", number'


def digest_of_run(seals: Sequence[Sealed]) -> bytes:
    """One digest over all seals of a run, in the order of their names."""
    ordered = sorted(seals, key=lambda seal: (seal.account_id, seal.chain.encode(), seal.number))
    return hashlib.sha256(b"".join(seal.digest() for seal in ordered)).digest()


# --- MACs -------------------------------------------------------------------------------------------


def link(pepper: Pepper, before: bytes, account_id: uuid.UUID, chain: str, number: int, content: bytes) -> bytes:
    """The MAC over what stands at a place, and over the link before it."""
    return pepper.tag(b"seal", before, account_id.bytes, chain.encode(), number.to_bytes(8), content)


def link_at_once(
    pepper: Pepper, before: bytes, account_id: uuid.UUID, number: int, digests: bytes, kept: bytes
) -> bytes:
    """The MAC over an account's entries from `number` on, by their digests and those of their calls."""
    return link(pepper, before, account_id, ENTRIES, number, digests + kept)


def call_mac(pepper: Pepper, account_id: uuid.UUID, call: bytes) -> bytes:
    """What a seal link by link kept of a call; `call` is the CALL_TEXT_DIGEST of its row."""
    return pepper.tag(b"seal/call", account_id.bytes, call)


def run_mac(
    pepper: Pepper, before: bytes, run_id: int, made_at: datetime, until: datetime, seals: int, digest: bytes
) -> bytes:
    """The MAC over a run, and over the run before it."""
    said = f"{run_id}/{made_at.timestamp():.6f}/{until.timestamp():.6f}/{seals}"
    return pepper.tag(b"seal/run", before, said.encode(), digest)


# --- the digests of rows, as SQL --------------------------------------------------------------------


def _micros(column: str) -> str:
    """A moment as a number: its text would depend on the session."""
    return f"(extract(epoch FROM {column}) * 1000000)::bigint"


def _digest(*columns: str) -> str:
    """SHA-256 over some columns of a row. Null, empty and the bounds between columns are told apart by JSON's own rules."""
    return f"sha256(convert_to(jsonb_build_array({', '.join(columns)})::text, 'UTF8'))"


def _quick_digest(*columns: str) -> str:
    """The first half of SHA-256 over some columns of a row as PostgreSQL sends them to programs, each with its type and its length:
    half of the other's time, at every call. A column that gets another type must be cast to what it was, here."""
    return f"substr(sha256(record_send(ROW({', '.join(columns)}))), 1, {LINK_BYTES})"


_ENTRY: Final = (
    "e.kind",
    "e.reference",
    "e.contra",
    "e.amount_nusd",
    "e.balance_after_nusd",
    "e.usage_id",
    "e.created_at",
)
_CALL: Final = (
    "u.id", "u.hold_id", "u.service", "u.request_id", "u.key_id", "u.window_start", "u.model", "u.served_model", "u.provider", "u.endpoint",
    "u.outcome", "u.upstream_id", "u.upstream_model", "u.cost_nusd", "u.provider_cost_nusd", "u.balance_after_nusd", "u.held_after_nusd",
    "u.latency_ms", "u.ttft_ms", "u.units", "u.price_version", "u.lines", "u.flags", "u.created_at",
)  # fmt: skip
_MOMENTS: Final = ("e.created_at", "u.window_start", "u.created_at")
ENTRY_DIGEST: Final = _quick_digest("e.account_id", "e.id", *_ENTRY)
CALL_DIGEST: Final = _quick_digest("u.account_id", *_CALL)
ENTRY_TEXT_DIGEST: Final = _digest(*(_micros(each) if each in _MOMENTS else each for each in _ENTRY))
CALL_TEXT_DIGEST: Final = _digest(*(_micros(each) if each in _MOMENTS else each for each in _CALL))
"""By which entries and calls were sealed link by link."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of row that has a chain of its own: `sql` selects account_id, chain, content, ends_at, revision and since.

    `content` is what never changes while `revision` is the same. `ends_at` may go from null to a moment, and no other way;
    what `may_go` may be deleted, and never come back. `since` is when it was written, for the job to look at what is new.
    """

    table: str
    name: str
    sql: str
    may_end: bool = False
    may_go: bool = False

    def rows(self, where: str = "true") -> str:
        return f"SELECT * FROM ({self.sql}) x WHERE {where}"


def _house(table: str, name: str, columns: Sequence[str], ends_at: str | None = None) -> Kind:
    return Kind(
        table, name,
        f"""SELECT '{HOUSE}'::uuid AS account_id, '{name}/' || x.id AS chain, {_digest(*columns)} AS content,
                   {ends_at or "NULL::timestamptz"} AS ends_at, 1::bigint AS revision, x.created_at AS since FROM {table} x""",
        may_end=ends_at is not None,
    )  # fmt: skip


_RULE: Final = (_micros("x.created_at"), _micros("x.effective_from"))
_KEY: Final = (
    "x.revision", "x.name", "x.preview", "encode(x.masked_hash, 'hex')", "x.limit_nusd", "x.reset_period", "to_jsonb(x.scopes)",
    "to_jsonb(x.allowed_models)", "x.call_limit_nusd", "x.requests_per_minute", _micros("x.expire_at"), _micros("x.disabled_at"), _micros("x.deleted_at"), "encode(x.proof, 'hex')",
)  # fmt: skip
_OF_TREES: Final = (
    "x.parent_id",
    "to_jsonb(x.ancestor_ids)",
    "to_jsonb(x.more_periods)",
    "to_jsonb(x.more_limits_nusd)",
)
_KEY_DIGEST: Final = f"""CASE WHEN num_nonnulls(x.parent_id, x.ancestor_ids, x.more_periods, x.more_limits_nusd) = 0
                              THEN {_digest(*_KEY)} ELSE {_digest(*_KEY, *_OF_TREES)} END"""
"""A key that stands under none and has one window is sealed as it was before there were trees."""
KINDS: Final = (
    _house("admin_log", "act", ("encode(x.proof, 'hex')", _micros("x.created_at"))),
    _house("admin_token", "admin_token", ("x.name", "encode(x.secret_hash, 'hex')", "to_jsonb(x.scopes)", _micros("x.expires_at"), _micros("x.created_at")), "x.revoked_at"),
    _house("fee", "fee", ("x.feature", "x.price_nusd", *_RULE), "x.effective_to"),
    _house("markup", "markup", ("x.scope", "x.subject", "x.multiplier_ppm", "x.fixed_per_request_nusd", *_RULE), "x.effective_to"),
    _house("price_override", "override", ("x.model", "x.provider", "x.dimension", "x.tier_min", "x.attributes", "x.price_pusd", "x.per_units", *_RULE), "x.effective_to"),
    _house("service_token", "service_token", ("x.name", "encode(x.secret_hash, 'hex')", "x.on_expiry", _micros("x.expires_at"), _micros("x.created_at")), "x.revoked_at"),
    Kind(
        "api_key", "key",
        f"""SELECT x.account_id, 'key/' || x.id AS chain, {_KEY_DIGEST} AS content, NULL::timestamptz AS ends_at,
                   x.revision, x.updated_at AS since FROM api_key x""",
    ),
    Kind(
        "credential", "credit_id",
        """SELECT x.account_id, 'credit_id/' || left(encode(x.secret_hash, 'hex'), 32) AS chain,
                  sha256(x.secret_hash || coalesce(x.proof, '')) AS content, NULL::timestamptz AS ends_at,
                  CASE WHEN x.ends_at IS NULL THEN 1 ELSE 2 END::bigint AS revision, x.created_at AS since FROM credential x WHERE x.kind = 'credit_id'""",
        may_go=True,
    ),
)  # fmt: skip

PRICES: Final = f"""
    SELECT line, subject, content FROM (
        SELECT 0 AS line, 'version ' || x.id AS subject, '' AS model, '' AS provider, '' AS dimension, 0::bigint AS tier_min, '' AS attributes,
               x.created_at AS since, {_digest("x.source", "x.source_hash", "x.note", _micros("x.created_at"))} AS content
        FROM price_version x WHERE x.id = :version_id
        UNION ALL
        SELECT 1, concat_ws('/', 'price', x.version_id, x.model, x.provider, x.dimension, x.tier_min, nullif(x.attributes, '')), x.model, x.provider,
               x.dimension, x.tier_min, x.attributes, x.effective_from,
               {_digest("x.model", "x.provider", "x.dimension", "x.tier_min", "x.attributes", "x.price_pusd", "x.per_units", _micros("x.effective_from"), _micros("x.effective_to"))}
        FROM price x WHERE x.version_id = :version_id
        UNION ALL
        SELECT 2, concat_ws('/', 'model', x.version_id, x.model, x.provider), x.model, x.provider, '', 0, '', NULL,
               {_digest("x.model", "x.provider", "x.mode", "x.max_output_tokens", "x.context_tokens", "x.default_attributes", "x.match")}
        FROM priced_model x WHERE x.version_id = :version_id
    ) lines
    ORDER BY line, model COLLATE "C", provider COLLATE "C", dimension COLLATE "C", tier_min, attributes COLLATE "C", since"""
"""Every line of a version of prices, in the order of its chain. Nothing is added to a version after its import."""
