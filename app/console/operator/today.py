"""Today: where an operator arrives."""

from typing import Final

from htpy import p
from litestar import get
from litestar.di import NamedDependency

from app.console.session import Operator
from app.console.shell import Frame, Page, card


@get("/operator", sync_to_thread=False)
def today(operator: NamedDependency[Operator], frame: NamedDependency[Frame]) -> Page:
    return frame.answer("Today", card(p[f"Signed in as {operator.admin.name}."]))


handlers: Final = (today,)
