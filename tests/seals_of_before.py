"""Entries sealed link by link, as the code before 0009 sealed them: what it left is looked at as it was, and it may still run beside ours."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain, sealing
from app.audit.chain import ENTRIES, NO_CALL, Sealed
from app.kernel.db import Row, rows

_ENTRIES_OF = f"""
    SELECT e.id, {chain.ENTRY_TEXT_DIGEST} AS content, CASE WHEN u.id IS NOT NULL THEN {chain.CALL_TEXT_DIGEST} END AS call
    FROM entry e LEFT JOIN usage u ON u.account_id = e.account_id AND u.id = e.usage_id
    WHERE e.account_id = :account_id AND e.id BETWEEN :first AND :last ORDER BY e.id"""


@contextmanager
def sealing_as_before() -> Iterator[None]:
    async def sealed(self: Any, session: AsyncSession, due: Any, _: Row | None) -> Sealed | None:
        links, kept, before = bytearray(), bytearray(), due.before
        found = await rows(session, _ENTRIES_OF, account_id=due.account_id, first=due.first, last=due.last)
        for number, entry in enumerate(found, due.first):
            if entry["id"] != number:
                break
            call = _mac(self._pepper, due.account_id, entry["call"])
            before = chain.link(self._pepper, before, due.account_id, ENTRIES, number, entry["content"] + call)
            links += before
            kept += call
        return Sealed(due.account_id, ENTRIES, due.first, bytes(links), bytes(kept)) if links else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing._Entries, "_sealed", sealed)
        yield


def _mac(pepper: Any, account_id: uuid.UUID, call: bytes | None) -> bytes:
    return NO_CALL if call is None else chain.call_mac(pepper, account_id, call)
