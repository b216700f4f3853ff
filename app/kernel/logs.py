"""Logs: JSON events with fields from an allow-list, so that a secret cannot slip in by a new name."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

ALLOWED_FIELDS = frozenset(
    {
        "account_id", "amount_nusd", "attempt", "attempts", "backend", "bonus_nusd", "charge_id", "code", "count",
        "delivery_type", "duration_ms", "error", "event", "exc_type", "hold_id", "invoice_id", "job", "key_id", "level",
        "method", "path", "pid", "port", "request_id", "seconds", "service", "state", "status", "timestamp", "topup_id",
        "url", "version", "where",
    }
)  # fmt: skip


_least = logging.NOTSET


def only_allowed_fields(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop what is not on the list and say that something was dropped."""
    dropped = [name for name in event if name not in ALLOWED_FIELDS]
    for name in dropped:
        del event[name]
    if dropped:
        event["count"] = event.get("count", len(dropped))
    return event


def configure(level: str) -> None:
    """Send our events, and warnings of libraries, to stderr as one JSON object a line."""
    global _least
    _least = logging.getLevelNamesMapping()[level]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            only_allowed_fields,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format='{"event":"library.warning","where":"%(name)s"}', force=True
    )


def is_told(level: int) -> bool:
    """Whether events of this level are written: asked where even putting one together would cost too much."""
    return level >= _least


def where_it_broke(error: BaseException) -> str:
    """The last frame of ours in a traceback, as `file:line`: says where, and never what was in it."""
    traceback, found = error.__traceback__, "?"
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if "/app/" in code.co_filename:
            found = f"{code.co_filename.rpartition('/app/')[2]}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


log: Any = structlog.get_logger()
