"""Keys that were made before there were trees of them: migrated, they are proven, sealed, audited and used as they were."""

import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import psycopg
import pytest

from app.audit import Secrets, audit
from app.audit.chain import KINDS
from app.audit.sealing import seal
from app.kernel.db import Database
from app.kernel.security import Kind, Pepper
from app.kernel.settings import Settings
from app.keys.issue import change
from app.keys.verify import KeyOwner, credential_proof
from app.migrations import migrate
from app.wiring import build
from tests.databases import at_revision
from tests.wallets import FakeLightning, FakeWallets

PROVEN_THEN = (
    "account_id", "id", "revision", "name", "preview", "masked_hash", "limit_nusd", "reset_period", "scopes", "allowed_models",
    "call_limit_nusd", "requests_per_minute", "expire_at", "disabled_at", "deleted_at",
)  # fmt: skip
SEALED_THEN = """
    sha256(convert_to(jsonb_build_array(x.revision, x.name, x.preview, encode(x.masked_hash, 'hex'), x.limit_nusd, x.reset_period,
        to_jsonb(x.scopes), to_jsonb(x.allowed_models), x.call_limit_nusd, x.requests_per_minute, (extract(epoch FROM x.expire_at) * 1000000)::bigint,
        (extract(epoch FROM x.disabled_at) * 1000000)::bigint, (extract(epoch FROM x.deleted_at) * 1000000)::bigint, encode(x.proof, 'hex'))::text, 'UTF8'))"""
"""As the first version of this service did it, to the letter."""


@pytest.fixture
def before_trees(clean: str) -> Iterator[str]:
    """A database as the first version left it."""
    with at_revision(clean, "0001") as url:
        yield url


def a_key(conn: psycopg.Connection[Any], pepper: Pepper, **wanted: Any) -> KeyOwner:
    """An account with one key, written as it was then."""
    owner = KeyOwner(uuid.uuid4(), uuid.uuid4())
    conn.execute("INSERT INTO account (id) VALUES (%s)", [owner.account_id])
    for kind, key_id in ((Kind.CREDIT_ID, None), (Kind.API_KEY, owner.key_id)):
        secret_hash = uuid.uuid4().bytes
        conn.execute(
            "INSERT INTO credential (secret_hash, kind, account_id, key_id, proof) VALUES (%s, %s, %s, %s, %s)",
            [secret_hash, kind.value, owner.account_id, key_id, credential_proof(pepper, secret_hash, kind, owner.account_id, key_id)],
        )  # fmt: skip
    key = dict.fromkeys(PROVEN_THEN) | {"name": "before", "preview": "sk-", "revision": 1} | wanted
    key |= {"account_id": owner.account_id, "id": owner.key_id}
    plain = [str(value) if isinstance(value, uuid.UUID) else value for value in key.values()]
    columns, places = ", ".join([*key, "proof"]), ", ".join(["%s"] * (len(key) + 1))
    proof = pepper.tag(b"api_key", msgspec.json.encode(plain))
    conn.execute(f"INSERT INTO api_key ({columns}) VALUES ({places})".encode(), [*key.values(), proof])
    return owner


async def test_keys_of_before_are_proven_sealed_and_used_as_they_were(before_trees: str, settings: Settings) -> None:
    pepper = settings.pepper
    with psycopg.connect(before_trees, autocommit=True) as conn:
        owners = [
            a_key(conn, pepper), a_key(conn, pepper, limit_nusd=1_000_000_000, reset_period="day"),
            a_key(conn, pepper, limit_nusd=5, scopes=["spend"], allowed_models=["m"], call_limit_nusd=4, requests_per_minute=9),
        ]  # fmt: skip
        then = conn.execute(f"SELECT x.id, {SEALED_THEN} FROM api_key x ORDER BY 1".encode()).fetchall()
        assert migrate(before_trees)
        [keys] = [kind for kind in KINDS if kind.table == "api_key"]
        now = conn.execute(f"SELECT substr(chain, 5)::uuid, content FROM ({keys.sql}) x ORDER BY 1".encode()).fetchall()
        assert now == then, "what a seal has kept of a key is what it says now"
    btcpay = FakeLightning()
    house = build(settings, before_trees, gateway=btcpay, wallets=FakeWallets(btcpay))
    await house.db.open()
    try:
        assert (await audit(house.db, Secrets.of(settings))).findings == ()
        assert await seal(house.db, pepper) > 0
        owner = owners[1]
        await house.db.transaction(
            lambda session: change(session, house.keyring, owner.account_id, owner.key_id, {"name": "after"})
        )
        assert await seal(house.db, pepper) == 1
        assert (await audit(house.db, Secrets.of(settings))).findings == ()
        assert await keys_proven(house.db) == 3
    finally:
        await house.close()


async def keys_proven(db: Database) -> int:
    return len(await db.many("SELECT 1 FROM api_key WHERE proof IS NOT NULL", {}))
