"""Pages for customers and operators: the same verbs as the API, rendered. How they are made is told in shell.py.

colours ── static ── session ── words ── shell ── forms ── door ── signing ── customer/, operator/ ── all of them, here
"""

from app.console.customer import handlers as customer
from app.console.door import catch_all, guarded
from app.console.front import handlers as front
from app.console.operator import handlers as operator
from app.console.receipt import handlers as receipt
from app.console.signing import handlers as signing
from app.console.static import static_file

router = guarded(*signing, *customer, *operator, *front, *receipt, static_file, catch_all)
