"""Whose secret is this: from a credit id or an API key to its account."""

import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Database, Row, row
from app.kernel.errors import InvalidApiKey, InvalidCreditId, MalformedHeader, MissingScope
from app.kernel.logs import log
from app.kernel.security import Caller, Kind, Pepper, canonical_credit_id, is_jwt, is_wellformed

_CACHE_SIZE = 100_000
PROOF_SCHEMES = ("l402", "lsat", "payment")
"""Of an Authorization header that holds a proof of payment, in any case."""
SCOPES = ("spend", "balance", "topup", "activity")
"""What a key may do that was narrowed to nothing: all of these."""
MANAGES_KEYS = "keys"
"""The scope of making and managing keys below one's own, which only a key has that names it."""


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """The two ids a key stands for. Never changes while the key's credential exists, so it may be cached."""

    account_id: uuid.UUID
    key_id: uuid.UUID


class Spending(Protocol):
    """Knows proofs of payment, which stand for the key that the payment was asked of."""

    async def spent(self, credential: str, beside: KeyOwner | None) -> KeyOwner:
        """The key that a request with this proof is made by: `beside`, where another key was sent too, else the proof's."""

    async def asked_of(self, payment_hash: bytes) -> KeyOwner | None:
        """The key that an invoice was made for. Its hash proves nothing."""


class Subjects(Protocol):
    """Knows JWTs, each of which stands for the key of its subject."""

    async def subject(self, token: str) -> bytes:
        """Whose it is, as `subject_hash` has it. Raises InvalidApiKey, IssuerUnavailable."""

    async def opened(self, subject: bytes) -> KeyOwner:
        """The key of a subject: made with an account of its own the first time, once, and never again."""


class Verifier:
    """Looks credentials up. What a key may do now is never cached: that is decided by its row.

    `proofs` knows proofs of payment, `subjects` JWTs, where there are any.
    """

    def __init__(self, db: Database, pepper: Pepper) -> None:
        self._db, self._pepper = db, pepper
        self.proofs: Spending | None = None
        self.subjects: Subjects | None = None
        self._owners: OrderedDict[bytes, KeyOwner] = OrderedDict()
        self._told: OrderedDict[bytes, KeyOwner] = OrderedDict()

    async def credit_id(self, text: str, *, also_over: bool = False) -> Caller:
        """Raises InvalidCreditId, alike for a malformed, an unknown and a rotated one; that is let by if `also_over`.

        Also for one that somebody made another account's in the database: with it go that account's keys.
        """
        found = await self._holder(Kind.CREDIT_ID, canonical_credit_id(text))
        if found is None or (found.lasts == "over" and not also_over):
            raise InvalidCreditId
        return found

    async def recovering(self, kind: Kind, secret: str | None) -> Caller | None:
        """Whose recovery code or Nostr key that is; None alike for whatever is none any more or never was."""
        found = await self._holder(kind, secret)
        return None if found is None or found.lasts == "over" else found

    async def _holder(self, kind: Kind, secret: str | None) -> Caller | None:
        """Asked of the database each time, whose clock decides what is over: so it is in every process at once."""
        lookup = self._pepper.lookup(secret or "")
        found = await self._db.one(_HOLDER, {"hash": lookup, "kind": kind.value})
        if secret is None or found is None:
            return None
        if found["proof"] != proof_of_credential(self._pepper, found):
            log.error("credential.forged", account_id=str(found["account_id"]))
            return None
        return Caller(kind, found["account_id"], found["key_id"], lasts=found["lasts"], lookup=lookup)

    async def api_key(self, secret: str) -> Caller:
        """A live key as a caller. Raises InvalidApiKey, alike for unknown, revoked, disabled and expired ones."""
        if self.takes_jwt(secret):
            return await self._of_subject(secret)
        lookup = self._pepper.lookup(secret) if is_wellformed(secret, "sk") else self._pepper.lookup("")
        owner = await self._look_up(lookup)
        if owner is None:
            raise InvalidApiKey
        return await self._live(owner)

    async def payer(self, proof: str, beside: Caller | None) -> Caller:
        """Who pays: the live key that a proof of payment stands for, or the one that was sent `beside` it.

        Raises InvalidApiKey, InvalidChallenge for a proof that was used, PaymentPending for a payment that is not credited yet.
        """
        if self.proofs is None:
            raise InvalidApiKey
        shown = KeyOwner(beside.account_id, beside.key_id) if beside is not None and beside.key_id is not None else None
        owner = await self.proofs.spent(proof, shown)
        if beside is not None and owner == shown:
            return beside
        return await self._live(owner)

    async def _of_subject(self, token: str) -> Caller:
        """`lookup` is the subject's, as every token of theirs is the same caller's."""
        assert self.subjects is not None
        subject = await self.subjects.subject(token)
        return replace(await self._live(await self._owner_of_subject(token, subject)), lookup=subject)

    async def _live(self, owner: KeyOwner) -> Caller:
        found = await self._db.one(_LIVE_KEY_BY_ID, {"account_id": owner.account_id, "key_id": owner.key_id})
        if found is None:
            raise InvalidApiKey
        return Caller(Kind.API_KEY, owner.account_id, owner.key_id, _scopes(found))

    def takes_jwt(self, secret: str) -> bool:
        """Whether this is to be judged as a JWT."""
        return self.subjects is not None and is_jwt(secret)

    def is_key(self, secret: str) -> bool:
        """Whether it has the shape of something that stands for a key here."""
        return is_wellformed(secret, "sk") or self.takes_jwt(secret)

    async def asked_of(self, sha256: bytes) -> KeyOwner | None:
        """The same for a proxy that only kept the SHA-256 of a key, a JWT or a payment's preimage: for a call that was admitted.

        Of JWTs only those that this process was shown are known so, also when they are over by now.
        """
        owner = self._told.get(sha256) or await self.owner_of(sha256=sha256)
        return owner if owner is not None or self.proofs is None else await self.proofs.asked_of(sha256)

    async def owner_of(self, *, secret: str | None = None, sha256: bytes | None = None) -> KeyOwner | None:
        """The account and key a secret (or its SHA-256) was issued for; says nothing of what it may do now.

        Raises InvalidApiKey and IssuerUnavailable for a JWT.
        """
        if secret is not None and self.subjects is not None and is_jwt(secret):
            return await self._owner_of_subject(secret, await self.subjects.subject(secret))
        if secret is not None:
            sha256 = hashlib.sha256(secret.encode()).digest()
        assert sha256 is not None
        cached = self._owners.get(sha256)
        if cached is not None:
            self._owners.move_to_end(sha256)
            return cached
        if secret is not None and not is_wellformed(secret, "sk"):
            return None
        owner = await self._look_up(self._pepper.lookup_hashed(sha256))
        return None if owner is None else _kept(self._owners, sha256, owner)

    async def _owner_of_subject(self, token: str, subject: bytes) -> KeyOwner:
        assert self.subjects is not None
        lookup = self._pepper.lookup_subject(subject)  # which no SHA-256 that a proxy tells can be
        owner = self._owners.get(lookup) or await self._look_up(lookup) or await self.subjects.opened(subject)
        _kept(self._told, hashlib.sha256(token.encode()).digest(), owner)
        return _kept(self._owners, lookup, owner)

    async def _look_up(self, lookup: bytes) -> KeyOwner | None:
        found = await self._db.one(
            "SELECT account_id, key_id FROM credential WHERE secret_hash = %(hash)s AND kind = 'api_key'",
            {"hash": lookup},
        )
        return None if found is None else KeyOwner(found["account_id"], found["key_id"])


def _kept(known: OrderedDict[bytes, KeyOwner], name: bytes, owner: KeyOwner) -> KeyOwner:
    """Remembered, in place of what was not asked for the longest."""
    known[name] = owner
    known.move_to_end(name)
    if len(known) > _CACHE_SIZE:
        known.popitem(last=False)
    return owner


def credential_proof(
    pepper: Pepper,
    secret_hash: bytes,
    kind: str,
    account_id: uuid.UUID,
    key_id: uuid.UUID | None,
    ends_at: datetime | None = None,
    label: str | None = None,
) -> bytes:
    """The MAC that binds a secret's hash to whose it is, until when, and to what is shown of it."""
    parts = [secret_hash, kind.encode(), account_id.bytes, key_id.bytes if key_id else b""]
    if ends_at is not None or label is not None:  # what has neither is proven as it was before there were these
        parts += [ends_at.astimezone(UTC).isoformat().encode() if ends_at else b"", (label or "").encode()]
    return pepper.tag(b"credential", *parts)


def proof_of_credential(pepper: Pepper, found: Mapping[str, Any]) -> bytes:
    """The same of a row as it stands."""
    return credential_proof(
        pepper, bytes(found["secret_hash"]), found["kind"], found["account_id"], found["key_id"], found["ends_at"], found["label"]
    )  # fmt: skip


def refuse_ending(caller: Caller) -> None:
    """Raises MissingScope for a credit id in its overlap: it reads and tops up, so that who stole it gains nothing that lasts."""
    if caller.lasts != "lasting":
        raise MissingScope(
            "This credit id was rotated: until its overlap ends it reads and tops up, and no more; use the new one"
        )


async def hold_still(session: AsyncSession, caller: Caller) -> None:
    """Lock the caller's account, for what may not be done with a credit id that was rotated since it was shown.

    Raises InvalidCreditId: whoever waited behind a rotation finds its own credential gone.
    """
    await row(session, "SELECT 1 AS locked FROM account WHERE id = :id FOR NO KEY UPDATE", id=caller.account_id)
    if caller.kind is not Kind.CREDIT_ID:
        return
    found = await row(
        session, f"SELECT 1 AS holds FROM credential WHERE {LASTING} AND secret_hash = :hash", hash=caller.lookup
    )
    if found is None:
        raise InvalidCreditId


@dataclass(frozen=True, slots=True)
class Shown:
    """What a customer shows of who they are: a credit id, an API key, a proof of payment, some of them or nothing."""

    credit_id: str | None = None
    api_key: str | None = None
    proof: str | None = None

    @classmethod
    def of(cls, lines: Iterable[tuple[str, str]], credit_id: str | None = None) -> "Shown":
        """From header lines, names in lower case, and a credit id that was told elsewhere.

        A key may come in any of the four ways in which clients send it. Raises MalformedHeader for two that differ:
        with one of them the caller would not get what they asked for. A proof of payment comes beside it, or alone.
        """
        ids, keys, proofs = [] if credit_id is None else [credit_id], [], []
        for name, value in lines:
            if name == "x-credit-id":
                ids.append(value)
            elif name == "authorization":
                scheme, _, token = value.partition(" ")
                if scheme.lower() in PROOF_SCHEMES:
                    proofs.append(value.strip())
                keys.append(token.strip() if scheme.lower() in ("bearer", "token") else "")
            elif name in ("x-api-key", "api-key"):
                keys.append(value)
        spelled = [canonical_credit_id(text) or text for text in ids]
        return cls(
            the_only(spelled, "credit ids", "x-credit-id"), the_only(filter(None, keys), "API keys", "Authorization"),
            the_only(proofs, "proofs of payment", "Authorization"),
        )  # fmt: skip


def the_only(values: Iterable[str], what: str, header: str) -> str | None:
    """The one value that was sent, however often. Raises MalformedHeader, without repeating any."""
    different = set(values)
    if len(different) > 1:
        raise MalformedHeader(f"{len(different)} different {what} were sent; send one", param=header)
    return different.pop() if different else None


async def authenticate(verifier: Verifier, shown: Shown) -> Caller:
    """Who is calling: by the credit id if it was shown, else by the API key. What was shown must prove something, all of it.

    Raises InvalidCreditId or InvalidApiKey, and MalformedHeader for a credit id and a key of two accounts.
    """
    owner = None if shown.credit_id is None else await verifier.credit_id(shown.credit_id)
    if shown.api_key is None and shown.proof is None:
        if owner is None:
            raise InvalidApiKey("No credential: send an API key as 'Authorization: Bearer sk-…', or 'x-credit-id'")
        return owner
    key = await key_of(verifier, shown, owner)
    return owner or key


async def key_of(verifier: Verifier, shown: Shown, owner: Caller | None) -> Caller:
    """The live key that was shown, or that a proof of payment stands for; it is of the account whose credit id was shown, if one was.

    Raises what `Verifier.payer` raises, and MalformedHeader.
    """
    key = None if shown.api_key is None else await verifier.api_key(shown.api_key)
    if shown.proof is not None:
        key = await verifier.payer(shown.proof, key)
    if key is None:
        raise InvalidApiKey
    if owner is not None and owner.account_id != key.account_id:
        raise MalformedHeader(
            "The credit id and the API key belong to two accounts; send those of one", param="x-credit-id"
        )
    return key


def require_scope(caller: Caller, scope: str) -> None:
    """Raises MissingScope if the caller is a key that was narrowed to other things."""
    if caller.scopes is not None and scope not in caller.scopes:
        raise MissingScope(f"This API key lacks the scope '{scope}'")


def narrowed(lists: Iterable[Iterable[str] | None], unsaid: Sequence[str] | None = None) -> list[str] | None:
    """What a key is left with where each key on the way to it was narrowed to a list, its own first; None if none was.

    `unsaid` is what a key has that was not narrowed, if that is not everything.
    """
    said = [None if each is None else list(each) for each in lists]
    if all(each is None for each in said):
        return None
    filled = [each if each is not None or unsaid is None else list(unsaid) for each in said]
    own, *others = [each for each in filled if each is not None]
    return [word for word in own if all(word in each for each in others)]


LASTING: Final = "ends_at IS NULL"
"""Of a credential: that it holds for good."""
CREDENTIAL: Final = "secret_hash, kind, account_id, key_id, proof, ends_at, label"
_HOLDER: Final = f"""
SELECT {CREDENTIAL}, CASE WHEN {LASTING} THEN 'lasting' WHEN ends_at > now() THEN 'ending' ELSE 'over' END AS lasts
FROM credential WHERE secret_hash = %(hash)s AND kind = %(kind)s
"""
_WORKS: Final = (
    "{key}.deleted_at IS NULL AND {key}.disabled_at IS NULL AND ({key}.expire_at IS NULL OR {key}.expire_at > now())"
)
_OF_ABOVE: Final = "(SELECT {what} FROM api_key x WHERE x.account_id = %(account_id)s AND x.id = up.id)"
"""Of one key above, asked by itself: among others of its account, all of the account's would be read as soon as most accounts have one."""
_IS_LIVE: Final = f"""
    {_WORKS.format(key="k")} AND NOT EXISTS (
        SELECT FROM unnest(k.ancestor_ids) up (id) WHERE {_OF_ABOVE.format(what=_WORKS.format(key="x"))} IS NOT TRUE)"""
"""A key works as long as every key above it does."""
_SCOPES: Final = f"""
    k.scopes, (SELECT jsonb_agg({_OF_ABOVE.format(what="x.scopes")}) FROM unnest(k.ancestor_ids) up (id)) AS scopes_above"""
_LIVE_KEY_BY_ID: Final = (
    f"SELECT {_SCOPES} FROM api_key k WHERE k.account_id = %(account_id)s AND k.id = %(key_id)s AND {_IS_LIVE}"
)


def _scopes(found: Row) -> frozenset[str] | None:
    left = narrowed([found["scopes"], *(found["scopes_above"] or ())], SCOPES)
    return None if left is None else frozenset(left)
