"""What goes on: proxies that ask and never settle, jobs that stand still, findings that wait for a person."""

from typing import Any, Final

from app.doctor.lines import Line, duration, fault, ok, warning
from app.kernel.db import row, rows
from app.kernel.errors import DatabaseUnavailable
from app.wiring import House

SILENT_SECONDS: Final = 3600
_OF_LATE: Final = "7 days"
_YOUNG_SECONDS: Final = 600
"""A call may take this long."""
_LATE_SECONDS: Final = 300
_PROXIES: Final = f"""
    SELECT service, extract(epoch FROM now() - max(closed_at) FILTER (WHERE state = 'settled'))::float AS settled_ago,
           extract(epoch FROM now() - min(created_at))::float AS first_ago,
           extract(epoch FROM now() - max(created_at))::float AS asked_ago,
           count(*) FILTER (WHERE state IN ('open', 'expired') AND created_at > now() - make_interval(secs => {SILENT_SECONDS})
                                  AND created_at < now() - make_interval(secs => {_YOUNG_SECONDS})) AS unsettled
    FROM hold
    WHERE service IN (SELECT name FROM service_token WHERE revoked_at IS NULL)
      AND (state = 'open' OR closed_at > now() - interval '{_OF_LATE}')
    GROUP BY service ORDER BY service"""
_STANDING: Final = f"""
    SELECT (SELECT count(*) FROM topup WHERE next_check_at < now() - make_interval(secs => {_LATE_SECONDS})) AS unchecked,
           (SELECT count(*) FROM webhook_delivery
            WHERE processed_at IS NULL AND attempts = 0 AND received_at < now() - make_interval(secs => {_LATE_SECONDS})) AS unread,
           (SELECT count(*) FROM hold WHERE state = 'open' AND expires_at < now() - make_interval(secs => {_LATE_SECONDS})) AS unexpired,
           (SELECT count(*) FROM topup WHERE review IS NOT NULL) AS reviews"""


async def look(house: House, _: str) -> list[Line]:
    try:
        proxies = await house.db.transaction(lambda session: rows(session, _PROXIES))
        standing = await house.db.transaction(lambda session: row(session, _STANDING))
    except DatabaseUnavailable:
        return [warning("traffic", "it is in the database, which cannot be asked")]
    assert standing is not None
    return [*(proxy_line(**proxy) for proxy in proxies), jobs_line(standing), reviews_line(standing["reviews"])]


def proxy_line(service: str, settled_ago: float | None, first_ago: float, asked_ago: float, unsettled: int) -> Line:
    """Seconds since its last settle, its first and its last authorize, and how many calls of the last hour it owes."""
    about = f"proxy.{service}"
    settled = "has never settled" if settled_ago is None else f"settled last {duration(settled_ago)} ago"
    is_silent = (first_ago if settled_ago is None else settled_ago) > SILENT_SECONDS
    if unsettled and is_silent:
        return fault(about, f"it {settled}, and asked for {unsettled} calls of the last hour", "those cost its users nothing, or their hold; see its log, and its spool")  # fmt: skip
    if is_silent and asked_ago < SILENT_SECONDS:
        return warning(about, f"it {settled}, and asked again {duration(asked_ago)} ago", "see its log")
    if is_silent:
        return warning(about, f"it {settled}", "is it running? Revoke its token if not")
    return ok(about, f"it {settled}")


def jobs_line(standing: dict[str, Any]) -> Line:
    late = [
        f"{standing[name]} {words}"
        for name, words in (("unchecked", "top-ups were not asked about"), ("unread", "webhooks were not looked into"), ("unexpired", "holds did not expire"))
        if standing[name]
    ]  # fmt: skip
    if late:
        return fault("jobs", f"for {duration(_LATE_SECONDS)} or more {' and '.join(late)}", "is `run`, or `run --only jobs`, running?")  # fmt: skip
    return ok("jobs", "nothing waits for them")


def reviews_line(waiting: int) -> Line:
    if waiting:
        return warning(
            "reviews", f"{waiting} top-ups wait for a person", "list them: satmeter topup list, or GET /admin/topups"
        )
    return ok("reviews", "no top-up waits for a person")
