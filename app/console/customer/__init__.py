"""A customer's pages."""

from app.console.customer import home

handlers = (*home.handlers,)
