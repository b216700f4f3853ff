"""An operator's pages."""

from app.console.operator import today

handlers = (*today.handlers,)
