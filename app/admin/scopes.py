"""What an admin token may be narrowed to, and which of it each route needs: here and nowhere else."""

from collections.abc import Iterable
from typing import Final, Literal, get_args

from app.kernel.errors import MissingScope
from app.kernel.security import Admin

Scope = Literal["read", "support", "money", "prices", "tokens"]
"""`read` shows whatever an operator may see; `support` helps a customer: accounts, keys, payments that did not arrive;
`money` moves it by hand; `prices` says what is asked for calls; `tokens` gives others what its bearer has."""
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

NEEDED: Final[dict[str, Scope]] = {
    "GET /admin/accounts": "read",
    "POST /admin/accounts/search": "read",
    "GET /admin/accounts/{account_id}": "read",
    "POST /admin/accounts": "support",
    "POST /admin/accounts/{account_id}/freeze": "support",
    "POST /admin/accounts/{account_id}/unfreeze": "support",
    "POST /admin/accounts/{account_id}/close": "support",
    "POST /admin/accounts/{account_id}/rotate": "support",
    "POST /admin/accounts/{account_id}/credit": "money",
    "POST /admin/accounts/{account_id}/debit": "money",
    "GET /admin/accounts/{account_id}/keys": "read",
    "GET /admin/accounts/{account_id}/keys/{key_id}": "read",
    "POST /admin/accounts/{account_id}/keys": "support",
    "PATCH /admin/accounts/{account_id}/keys/{key_id}": "support",
    "DELETE /admin/accounts/{account_id}/keys/{key_id}": "support",
    "POST /admin/accounts/{account_id}/keys/{key_id}/disable": "support",
    "POST /admin/accounts/{account_id}/keys/{key_id}/enable": "support",
    "POST /admin/accounts/{account_id}/keys/{key_id}/revoke": "support",
    "GET /admin/topups": "read",
    "GET /admin/topups/unapplied": "read",
    "POST /admin/topups/{topup_id}/reconcile": "support",
    "POST /admin/topups/{topup_id}/resolve": "money",
    "GET /admin/prices": "read",
    "GET /admin/prices/rules": "read",
    "GET /admin/prices/{version}/diff": "read",
    "POST /admin/prices/import": "prices",
    "POST /admin/prices/{version}/activate": "prices",
    "POST /admin/prices/overrides": "prices",
    "POST /admin/prices/markups": "prices",
    "POST /admin/prices/fees": "prices",
    "DELETE /admin/prices/rules/{rule_id}": "prices",
    "GET /admin/tokens": "read",
    "POST /admin/tokens": "tokens",
    "DELETE /admin/tokens/{token_id}": "tokens",
    "POST /admin/tokens/{token_id}/revoke": "tokens",
    "GET /admin/audit": "read",
    "GET /admin/audit/{audit_id}": "read",
    "GET /admin/audit-log": "read",
    "GET /admin/stats": "read",
}
"""By method and path. A route that is not here needs a token with all of them."""


def require_scope_of(admin: Admin, method: str, path: str) -> None:
    """Raises MissingScope, naming what the token lacks."""
    needed = NEEDED.get(f"{'GET' if method == 'HEAD' else method} {path}")
    require(admin, SCOPES if needed is None else (needed,))


def require(admin: Admin, scopes: Iterable[str]) -> None:
    """Raises MissingScope, naming what the token lacks."""
    lacking = [] if admin.scopes is None else [scope for scope in scopes if scope not in admin.scopes]
    if lacking:
        raise MissingScope(
            f"This admin token lacks the scope {', '.join(map(repr, lacking))}", metadata={"missing_scopes": lacking}
        )
