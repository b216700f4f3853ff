"""How an error looks: one body for every refusal, whoever refuses."""

import re
from typing import Any, Final

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from app.kernel.errors import AppError, BodyTooLarge, InvalidField, MalformedHeader, MalformedJson, NotFound
from app.kernel.logs import log, where_it_broke
from app.web.methods import with_head

_MISSING: Final = re.compile(r"Missing required \w+ parameter '(\w+)'")
"""Litestar's words for a parameter that was left out, which it names nowhere else."""
OPENROUTER: Final = "/api/v1/"
"""Below this path we speak as OpenRouter does."""


def error_body(error: AppError, path: str = "") -> dict[str, Any]:
    """The one body of every refusal: OpenAI's clients read `error`, older ones `message`."""
    return {"error": _inner(error, path), "message": error.message, "statusCode": error.status}


def _inner(error: AppError, path: str) -> dict[str, Any]:
    """Clients of OpenRouter, which ask below its path, read `code` as a whole number: the status; ours is in `metadata`.

    Source: OpenRouter API, "Errors".
    """
    inner = error.wire()
    if not path.startswith(OPENROUTER):
        return inner
    return inner | {"code": error.status, "metadata": {**inner.get("metadata", {}), "error_code": error.code}}


def render(error: AppError, path: str = "") -> Response[Any]:
    headers = {"Cache-Control": "no-store", **error.headers}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(error_body(error, path), status_code=error.status, headers=headers, media_type="application/json")


def on_app_error(request: Request[Any, Any, Any], error: AppError) -> Response[Any]:
    request.state.error_code = error.code
    if error.status >= 500:
        log.warning("request.unavailable", code=error.code, where=where_it_broke(error))
    return render(error, request.scope["path"])


class MethodNotAllowed(AppError):
    """This address does not take that method."""

    status, code, type = 405, "method_not_allowed", "invalid_request_error"


def on_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Litestar's own refusals, in our words."""
    if error.status_code >= 500:
        return on_defect(request, error)
    answer = on_app_error(request, _ours(error))
    if error.status_code == 405:
        taken = filter(None, (error.headers or {}).get("allow", "").split(", "))
        answer.headers["Allow"] = ", ".join(sorted(with_head(taken)))
    return answer


def _ours(error: HTTPException) -> AppError:
    if isinstance(error, ValidationException):
        return _invalid(error)
    by_status: dict[int, AppError] = {404: NotFound(), 405: MethodNotAllowed(), 413: BodyTooLarge()}
    # What is left of Litestar's 400s is a Host or Content-Length that makes no sense; it may hold anything.
    return by_status.get(error.status_code) or MalformedHeader("The Host or Content-Length header is malformed")


def _invalid(error: ValidationException) -> AppError:
    if missing := _MISSING.match(error.detail):
        return InvalidField(f"{missing[1]} is required", param=missing[1])
    first = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    param, message = first.get("key"), first.get("message", "is not valid")
    if param == "data":
        return MalformedJson("This needs a JSON body")
    return InvalidField(f"{param}: {message}" if param else str(message), param=param)


def on_defect(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """A defect of ours: say so, log where, and nothing of what was in it."""
    request.state.error_code = "internal_error"
    log.error("request.defect", exc_type=type(error).__name__, where=where_it_broke(error))
    broken = AppError("Something of ours broke; it is logged under this request's X-Request-Id")
    return render(broken, request.scope["path"])
