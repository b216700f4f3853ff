"""Which calls are in usage_day, and which are not yet: an account's entries in their order, up to a mark.

An account's entries count 1, 2, 3 …, written under its lock: whatever a snapshot sees of them is all that there is up to some
number. A call is an entry, and so is a refund. So `usage_summed` says of each account how many of its entries usage_day tells,
and usage_day together with the entries behind that mark is every call exactly once, in every snapshot, whatever was summed when,
whatever clock made a call's id, and whoever still waits to commit.
"""

from typing import Final

from app.activity.calendar import MOST, day_of, is_call_id

KEY: Final = ("account_id", "day", "key_id", "model", "served_model", "provider")
FIGURES: Final = (
    "requests", "input_tokens", "output_tokens", "reasoning_tokens", "cost_nusd", "refunded_nusd", "known_requests", "known_nusd",
    "provider_nusd",
)  # fmt: skip
_TOKENS: Final = frozenset(name for name in FIGURES if name.endswith("_tokens"))

_OPEN: Final = """
    SELECT a.id AS account_id, coalesce(s.entries, 0) AS after, a.entry_count AS until
    FROM account a LEFT JOIN usage_summed s ON s.account_id = a.id WHERE a.entry_count > coalesce(s.entries, 0)"""
SUMMED: Final = "SELECT account_id, 0 AS after, entries AS until FROM usage_summed"
"""Ranges of entries: those that usage_day tells."""


def sum_of(name: str) -> str:
    """SQL: a figure added up. Counts of tokens beyond what a column holds are told as this much, so that they stop no sum."""
    return f"least(sum({name}), {MOST})::bigint" if name in _TOKENS else f"sum({name})::bigint"


SUMS: Final = ", ".join(f"{sum_of(name)} AS {name}" for name in FIGURES)


def told_by(ranges: str, *, few: bool = False, account: str | None = None) -> str:
    """SQL: what entries tell of calls, a row each: KEY and FIGURES. `ranges` has account_id, after, until: of each account its
    entries behind `after`, up to `until`. Where they are `few`, they and their calls are looked up one by one, whatever the
    planner thinks of how many there are. `account`, where it is one alone, is said wherever a database that is sharded looks for it."""
    is_it = "true" if account is None else f"{{}}.account_id = {account}"
    call = "usage u ON u.account_id = e.account_id AND u.id = e.call_id"
    entries = "entry n ON n.account_id = r.account_id AND n.id > r.after AND n.id <= r.until"
    if few:
        call = (
            "LATERAL (SELECT * FROM usage c WHERE c.account_id = e.account_id AND c.id = e.call_id"
            f" AND {is_it.format('c')} LIMIT 1) u ON true"
        )
        entries = (
            "LATERAL (SELECT * FROM entry n WHERE n.account_id = r.account_id AND n.id > r.after AND n.id <= r.until"
            f" AND {is_it.format('n')} OFFSET 0) n ON true"
        )

    def of_call(figure: str) -> str:
        return f"CASE WHEN e.is_call THEN {figure} ELSE 0 END"

    def tokens(name: str) -> str:
        return of_call(f"coalesce((u.units->>'{name}')::bigint, 0)")

    return f"""
    SELECT e.account_id, {day_of("u.id")} AS day, u.key_id, coalesce(u.model, u.served_model, '') AS model,
           coalesce(u.served_model, u.model, '') AS served_model, coalesce(u.provider, u.lines->>'provider', '') AS provider,
           {of_call("1")} AS requests, {tokens("input_tokens")} AS input_tokens, {tokens("output_tokens")} AS output_tokens,
           {tokens("reasoning_tokens")} AS reasoning_tokens, {of_call("u.cost_nusd")} AS cost_nusd,
           CASE WHEN e.is_call THEN 0 ELSE e.amount_nusd END AS refunded_nusd,
           CASE WHEN e.is_call AND u.provider_cost_nusd IS NOT NULL THEN 1 ELSE 0 END AS known_requests,
           CASE WHEN e.is_call AND u.provider_cost_nusd IS NOT NULL THEN u.cost_nusd ELSE 0 END AS known_nusd,
           {of_call("coalesce(u.provider_cost_nusd, 0)")} AS provider_nusd
    FROM (SELECT n.account_id, n.kind = 'usage' AS is_call, n.amount_nusd,
                 coalesce(n.usage_id, CASE WHEN {is_call_id("n.reference")} THEN n.reference::uuid END) AS call_id
          FROM ({ranges}) r JOIN {entries}
          WHERE n.kind = 'usage' OR (n.kind = 'refund' AND n.contra = 'revenue:usage')) e
    JOIN {call}"""


def lines(of_days: str = "true", *, of_all: bool = False) -> str:
    """SQL: every call of the account :account_id, or of all, once, in lines to be added up: KEY and FIGURES.

    `of_days` is a condition on a line's columns, which usage_day is looked at by.
    """
    columns = ", ".join((*KEY, *FIGURES))
    one, ranges = ("true", _OPEN) if of_all else ("account_id = :account_id", f"{_OPEN} AND a.id = :account_id")
    account = None if of_all else ":account_id"
    return f"""
    SELECT {columns} FROM usage_day WHERE {one} AND {of_days}
    UNION ALL
    SELECT {columns} FROM ({told_by(ranges, few=True, account=account)}) behind WHERE {of_days}"""
