"""Callers with somebody else's tokens: an account for each subject of a JWT, opened when it first calls."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.accounts import write_new
from app.kernel.db import Database, new_id
from app.keys.issue import Keyring, NewKey, issue_to_subject
from app.keys.verify import KeyOwner

KEY_NAME = "JWT"


class Issuer(Protocol):
    """Judges the tokens of whoever signs them."""

    async def subject(self, token: str) -> bytes:
        """Whose it is, as `subject_hash` has it. Raises InvalidApiKey, and IssuerUnavailable where nobody can tell."""

    async def keys(self) -> Sequence[str]:
        """What the keys are that sign now, asked for now. Raises IssuerUnavailable."""

    async def close(self) -> None:
        """Give back every connection."""


class TokenSubjects:
    """Tells whose a token is, and opens an account for who had none. `scopes` are what its key may do."""

    def __init__(self, db: Database, keyring: Keyring, issuer: Issuer, scopes: Sequence[str]) -> None:
        self._db, self._keyring, self._issuer, self._scopes = db, keyring, issuer, scopes

    async def subject(self, token: str) -> bytes:
        """Raises InvalidApiKey, IssuerUnavailable."""
        return await self._issuer.subject(token)

    async def opened(self, subject: bytes) -> KeyOwner:
        """Calls of one moment open one account. What was revoked or closed stays so: it is known, and nothing new is made."""
        return await self._db.transaction(partial(self._open, subject=subject))

    async def _open(self, session: AsyncSession, subject: bytes) -> KeyOwner:
        account_id, key_id = new_id(), new_id()
        owner = KeyOwner(*await self._keyring.claim(session, subject, account_id, key_id))
        if owner == KeyOwner(account_id, key_id):
            await self._write(session, owner, subject)
        return owner

    async def _write(self, session: AsyncSession, owner: KeyOwner, subject: bytes) -> None:
        await write_new(session, self._keyring, owner.account_id)
        await issue_to_subject(
            session, self._keyring, owner.account_id, owner.key_id, subject, NewKey(KEY_NAME, scopes=list(self._scopes))
        )
