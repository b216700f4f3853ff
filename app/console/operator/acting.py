"""What a signed-in operator may do: by the table of the API's routes, so that a token is as wide here as there."""

from collections.abc import Sequence
from typing import Final

from htpy import Element, Node, a, button, dd, div, dl, dt, h2, section, small, span, table, tbody, td, th, thead, tr
from htpy import form as form_
from htpy import input as input_

from app.admin.scopes import require_scope_of
from app.console.session import Operator
from app.console.shell import Frame, empty, labelled
from app.kernel.errors import MissingScope
from app.kernel.security import Admin

FREEZE: Final = "POST /admin/accounts/{account_id}/freeze"
CLOSE: Final = "POST /admin/accounts/{account_id}/close"
ROTATE: Final = "POST /admin/accounts/{account_id}/rotate"
CREDIT: Final = "POST /admin/accounts/{account_id}/credit"
SWITCH_KEY: Final = "POST /admin/accounts/{account_id}/keys/{key_id}/disable"
READ: Final = "GET /admin/stats"
RECONCILE: Final = "POST /admin/topups/{topup_id}/reconcile"
RESOLVE: Final = "POST /admin/topups/{topup_id}/resolve"
IMPORT: Final = "POST /admin/prices/import"
ACTIVATE: Final = "POST /admin/prices/{version}/activate"
OVERRIDE: Final = "POST /admin/prices/overrides"
MARKUP: Final = "POST /admin/prices/markups"
FEE: Final = "POST /admin/prices/fees"
END_RULE: Final = "DELETE /admin/prices/rules/{rule_id}"
MAKE_TOKEN: Final = "POST /admin/tokens"  # noqa: S105 - a route
REVOKE_TOKEN: Final = "POST /admin/tokens/{token_id}/revoke"  # noqa: S105 - a route
AUDIT: Final = "GET /admin/audit"
LOG: Final = "GET /admin/audit-log"


def acting(operator: Operator, route: str) -> Admin:
    """The operator as the verbs know one. Raises MissingScope where the token may not do what this route of the API does."""
    method, _, path = route.partition(" ")
    require_scope_of(operator.admin, method, path)
    return operator.admin


def may(operator: Operator, route: str) -> bool:
    """Whether a button is shown."""
    try:
        acting(operator, route)
    except MissingScope:
        return False
    return True


# --- what the operator's pages are made of ----------------------------------------------------------


def sheet(columns: str, rows: Sequence[Node], none: str, *does: Node, label: str = "") -> Element:
    """A table. `columns` are its heads, separated by `|`; one that begins with `#` has numbers. `none` stands where no row is."""
    if not rows:
        return empty(none, *does)
    heads = [
        th(scope="col", class_="n" if name.startswith("#") else None)[name.lstrip("#")] for name in columns.split("|")
    ]
    return div(
        class_="table", tabindex="0", role="region", aria_label=label or columns.replace("#", "").replace("|", ", ")
    )[table[thead[tr[heads]], tbody[rows]]]


def line(*cells: Node, numbers: str = "") -> Element:
    """A row of it; `numbers` are the places of those that stand to the right, such as `2 3`."""
    right = {int(place) for place in numbers.split()}
    return tr[(td(class_="n" if place in right else None)[cell] for place, cell in enumerate(cells))]


def pill(words: str, look: str = "") -> Element:
    return span(class_=f"pill {look}".strip())[words]


def act(frame: Frame, address: str, words: str, *fields: Node, look: str = "outline", **hidden: str) -> Element:
    """A form that does one thing."""
    return form_(method="post", action=address)[
        frame.guard(), (input_(type="hidden", name=name, value=value) for name, value in hidden.items()), *fields,
        button(class_=f"{look} small".strip())[words],
    ]  # fmt: skip


def because(is_needed: bool = True) -> Element:
    """Why: it stands in the log."""
    hint = "It stands in the log." if is_needed else "May be left out. It stands in the log."
    return labelled("Reason", input_(name="reason", required=is_needed, minlength="3", maxlength="500"), hint)


def figures(title: str, *pairs: tuple[str, Node, Node]) -> Element:
    """Figures side by side: each with its name, and what it means."""
    return section(class_="card")[
        title and h2[title],
        dl(class_="figures")[
            (div(class_="figure")[dt[name], dd[value, hint and small[hint]]] for name, value, hint in pairs)
        ],
    ]


def more(address: str, words: str = "Older") -> Element:
    return div(class_="acts")[a(href=address, class_="button outline small")[words]]
