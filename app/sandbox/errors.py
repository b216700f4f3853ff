"""Every refusal of the sandbox, in BTCPay's own shapes and codes.

    SandboxError                    {"code", "message"}
    ├─ Unauthenticated              401 unauthenticated
    ├─ MissingPermission            403 missing-permission (+ permission)
    ├─ NotFound                     404 invoice-not-found, webhook-not-found, ...
    ├─ NoPaymentMethod, BadRequest  400 generic-error
    ├─ Impossible                   409 impossible: the driver asked for what no payer could do
    └─ Invalid                      422 [{"path", "message"}], one per field

Source: BTCPayServer.Abstractions/Extensions/GreenfieldExtensions.cs and Hosting/Startup.cs at v2.4.1. The published
OpenAPI file says 400 for validation errors; the code answers 422.
"""

from typing import Any


class SandboxError(Exception):
    """A refusal with an HTTP status, BTCPay's code, and a sentence."""

    status = 400
    code = "generic-error"

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)

    def body(self) -> Any:
        """What goes over the wire."""
        return {"code": self.code, "message": self.message}


class BadRequest(SandboxError):
    """The request could not be read."""


class NoPaymentMethod(SandboxError):
    """None of the payment methods asked for could be offered."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(["Error retrieving a matching payment method or rate.", *problems]))


class Unauthenticated(SandboxError):
    """Authentication is required for accessing this endpoint"""

    status = 401
    code = "unauthenticated"

    def __init__(self) -> None:
        super().__init__("Authentication is required for accessing this endpoint")


class MissingPermission(SandboxError):
    """The API key lacks a permission, or is of another store."""

    status = 403
    code = "missing-permission"

    def __init__(self, permission: str) -> None:
        self.permission = permission
        super().__init__(f'Insufficient API Permissions. Please use an API key with permission "{permission}".')

    def body(self) -> Any:
        return {**super().body(), "permission": self.permission}


class NotFound(SandboxError):
    """There is no such `what`: invoice, webhook or webhookdelivery."""

    status = 404

    def __init__(self, what: str) -> None:
        self.code = f"{what}-not-found"
        super().__init__(f"The {what} was not found")


class Impossible(SandboxError):
    """The driver asked for something that cannot happen, such as double-spending a Lightning payment."""

    status = 409
    code = "impossible"


class Invalid(SandboxError):
    """Fields of the request that fail validation: pairs of JSON path and sentence."""

    status = 422
    code = "validation-error"

    def __init__(self, *problems: tuple[str, str]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))

    def body(self) -> Any:
        return [{"path": path, "message": message} for path, message in self.problems]
