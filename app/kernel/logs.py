"""Logs: JSON events with fields from an allow-list, so that a secret cannot slip in by a new name."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import msgspec
import structlog

ALLOWED_FIELDS = frozenset(
    {
        "account_id", "address", "amount_nusd", "at", "attempt", "attempts", "backend", "bonus_nusd", "charge_id", "code", "count",
        "delivery_type", "duration_ms", "error", "event", "exc_type", "head", "hold_id", "invoice_id", "job", "key_id", "level",
        "method", "path", "pid", "port", "request_id", "seconds", "service", "state", "status", "timestamp", "topup_id", "trace_id",
        "url", "version", "where",
    }
)  # fmt: skip


_CLIENT: Final = "satmeter.client"
_least = logging.NOTSET
_stream: TextIO = sys.stderr
_encode: Final = msgspec.json.Encoder().encode


def only_allowed_fields(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop what is not on the list and say that something was dropped."""
    dropped = [name for name in event if name not in ALLOWED_FIELDS]
    for name in dropped:
        del event[name]
    if dropped:
        event["count"] = event.get("count", len(dropped))
    return event


def configure(level: str) -> None:
    """Send our events, and that a library had something to say, to stderr as one JSON object a line.

    What it said stays untold: a message or a traceback may hold anything, and neither fits an allow-list.
    """
    global _least, _stream
    _least, _stream = logging.getLevelNamesMapping()[level], sys.stderr
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            only_allowed_fields,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_least),
        logger_factory=structlog.WriteLoggerFactory(_stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_OneEvent()], force=True)


def tell_of_request(
    request_id: str | None,
    method: str,
    path: str,
    status: int,
    duration_ms: float,
    code: str | None,
    trace_id: str | None = None,
) -> None:
    """The line of a request, at level info; with its trace's id where traces are kept. There is one for each, and structlog's way to it costs as much as a verdict."""
    if is_told(logging.INFO):
        line = {
            "event": "request", "request_id": request_id, "method": method, "path": path, "status": status,
            "duration_ms": duration_ms, "code": code, "level": "info", "timestamp": datetime.now(UTC),
        }  # fmt: skip
        if trace_id is not None:
            line["trace_id"] = trace_id
        _stream.write(_encode(line).decode() + "\n")
        _stream.flush()


class _OneEvent(logging.Handler):
    """A library's record as one event of ours: which library, how bad, and what it raised where in our code.

    The client is a stranger too, but the first word of what it says is the name of an event, and a constant of ours.
    """

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None and isinstance(record.msg, BaseException):
            error = record.msg
        is_bad = record.levelno >= logging.ERROR
        event = "library.error" if is_bad else "library.warning"
        if record.name == _CLIENT:
            event = str(record.msg).partition(" ")[0]
        tell(event, record.name, error, record.levelno)


def tell(event: str, where: str, error: BaseException | None, level: int = logging.ERROR) -> None:
    """One event about what others raised; never raises itself."""
    with contextlib.suppress(Exception):
        raised = {"exc_type": type(error).__name__, "at": where_it_broke(error)} if error is not None else {}
        log.log(level, event, where=where, **raised)


def catch_all() -> None:
    """For the doors of a process: whatever Python itself would print of an error becomes an event, too."""
    sys.excepthook = lambda _, error, __: tell("process.died", "main", error)
    sys.unraisablehook = lambda found: tell("library.error", "unraisable", found.exc_value)
    threading.excepthook = lambda found: tell("library.error", "thread", found.exc_value)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    with contextlib.suppress(Exception):
        log.warning("library.warning", where="warnings", exc_type=category.__name__)


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
