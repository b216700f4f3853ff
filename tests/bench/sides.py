"""A source tree that is measured: its server over a fresh PostgreSQL of its own, with accounts that the load uses."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
from psycopg.rows import dict_row

from app.admin.acts import proof_of
from app.kernel.embedded import EmbeddedPostgres
from app.kernel.security import Pepper, new_secret
from app.keys.proof import PROVEN, key_proof
from app.keys.verify import credential_proof
from tests.bench.load import Measured, warm
from tests.program import ROOT, Program

ACCOUNTS: Final = 10_000
_PEPPER: Final = "the bench's pepper, which protects nothing at all"


@dataclass(frozen=True, slots=True)
class Run:
    """A measurement, and the processor time that one call of it took in PostgreSQL and in the workers."""

    measured: Measured
    postgres_us: float
    worker_us: float


@dataclass(frozen=True, slots=True)
class Side:
    """A tree that is up. `keys` are the API keys of as many accounts, each with a million dollars."""

    name: str
    folder: Path
    database_url: str
    program: Program
    token: str
    keys: list[str]
    _postmaster: Any
    _workers: list[Any]

    @property
    def port(self) -> int:
        return self.program.http_port

    def during(self, run: Callable[[], Measured]) -> Run:
        """Processor time tells what a call costs, also when somebody else uses the machine meanwhile."""
        before = self._seconds()
        measured = run()
        postgres, worker = (after - start for after, start in zip(self._seconds(), before, strict=True))
        return Run(measured, postgres / measured.calls * 1e6, worker / measured.calls * 1e6)

    def _seconds(self) -> tuple[float, float]:
        """Of backends that live, and of those that the postmaster has buried."""
        buried, postgres = self._postmaster.cpu_times(), 0.0
        for child in self._postmaster.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                postgres += sum(child.cpu_times()[:2])
        return postgres + buried.children_user + buried.children_system, sum(
            sum(worker.cpu_times()[:2]) for worker in self._workers
        )

    def findings(self) -> list[Any]:
        """What this tree's own auditor has to say."""
        done = self.program.command("audit", "--json")
        return list(json.loads(done.stdout)["findings"])

    def worker_mib(self) -> float:
        """The largest worker's memory."""
        return float(max(worker.memory_info().rss for worker in self._workers)) / 2**20


@contextlib.contextmanager
def served(tree: Path, name: str, *, workers: int, accounts: int, rows: int) -> Iterator[Side]:
    """A tree over `accounts` accounts and `rows` past calls, from its start to its end."""
    folder = Path(tempfile.mkdtemp(prefix="satmeter-bench-"))
    folder.chmod(0o755)
    (folder / "database").mkdir(mode=0o755)
    server = EmbeddedPostgres(folder / "database")
    program: Program | None = None
    try:
        url = server.start()
        settings = {"DATABASE_URL": url, "SECRET_PEPPER": _PEPPER, "WORKERS": str(workers), "LOG_LEVEL": "WARNING"}
        program = Program(folder, **settings)
        program.run_the_source_of(tree)
        program.longest_command_seconds = 3600  # ten million calls take a while to audit
        migrated = program.command("migrate")
        assert migrated.returncode == 0, migrated.stderr
        _age(url)
        keys = _plant(url, accounts, rows)
        program.start()
        program.wait_until_ready()
        token = program.answer("token", "create", "--service", "bench")["token"]
        _settle_down(url)
        warm(program.http_port, token, keys)
        assert server.pid is not None
        yield Side(
            name, folder, url, program, token, keys, psutil.Process(server.pid), program.children("http")
        )  # fmt: skip
    finally:
        if program is not None:
            program.kill()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def taking_all_that_wait() -> Iterator[Path]:
    """A copy of this tree in which a batch takes all calls that wait: what `_share` in app/metering/batch.py gains."""
    with tempfile.TemporaryDirectory(prefix="satmeter-bench-") as folder:
        for name in ("app", "alembic"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        batch = Path(folder) / "app/metering/batch.py"
        text = batch.read_text()
        assert text.count(_EVEN) == 1
        batch.write_text(text.replace(_EVEN, "return 1"))
        yield Path(folder)


_EVEN: Final = "return min(1, (waiting + before) / (2 * waiting))"


# --- accounts and history -----------------------------------------------------------------------------


def _age(url: str) -> None:
    """Leave WAL files behind that can be used again, as a server has that is not new.

    A new one makes each of its first files, and meanwhile, for tens of milliseconds, every commit waits.
    """
    with psycopg.connect(url, autocommit=True) as conn:
        for _ in range(375):
            conn.execute("SELECT pg_logical_emit_message(false, 'bench', repeat('x', 8000000))")
        conn.execute("CHECKPOINT")


def _settle_down(url: str) -> None:
    """Wait until the past is sealed and was audited once, which no call of the measured ones should pay for."""
    with psycopg.connect(url, autocommit=True) as conn:
        if conn.execute("SELECT to_regclass('seal_run') IS NULL").fetchone() == (True,):
            return  # it is a tree of before
        for _ in range(300):  # a seal is 90 seconds late, and the audit comes after it
            if conn.execute(_IS_SETTLED).fetchone() == (True,):
                return
            time.sleep(1)
    raise TimeoutError("the past was not sealed and audited within five minutes")


_IS_SETTLED: Final = """
    SELECT coalesce((SELECT max(until) > 'epoch' FROM seal_run), false) AND coalesce((SELECT max(rounds) > 0 FROM audit_walk), false)"""


def _plant(url: str, accounts: int, rows: int) -> list[str]:
    """Accounts with a million dollars and a key each, and past calls; returns the keys that the load will use."""
    pepper = Pepper(_PEPPER.encode())
    with psycopg.connect(url, autocommit=True) as conn:
        keys = [new_secret("sk") for _ in range(ACCOUNTS)]
        conn.execute("CREATE TEMP TABLE mine (number int, hash bytea)")
        with conn.cursor() as cursor, cursor.copy("COPY mine FROM STDIN") as copy:
            for number, key in enumerate(keys):
                copy.write_row((number * (accounts // ACCOUNTS), pepper.lookup(key)))
        for step, statement in enumerate(_PLANTING, start=1):
            if rows:
                print(f"  step {step} of {len(_PLANTING)}", flush=True)
            conn.execute(statement.encode(), {"accounts": accounts, "each": rows // accounts})
        if conn.execute(
            "SELECT FROM pg_attribute WHERE attrelid = 'credential'::regclass AND attname = 'proof'"
        ).rowcount:
            _bind(conn, pepper)  # else it is a tree of before
        for table in ("account", "api_key", "credential", "entry", "usage"):
            conn.execute(f"VACUUM ANALYZE {table}".encode())
        conn.execute("CHECKPOINT")
    return keys


def _bind(conn: psycopg.Connection[Any], pepper: Pepper) -> None:
    """What only those can write who know the pepper, and the audit looks for: proofs of credentials and keys, acts behind adjustments."""
    conn.execute("CREATE TEMP TABLE bound (secret_hash bytea, proof bytea)")
    credentials = conn.execute("SELECT secret_hash, kind, account_id, key_id FROM credential").fetchall()
    with conn.cursor() as cursor, cursor.copy("COPY bound FROM STDIN") as copy:
        for secret_hash, kind, account_id, key_id in credentials:
            copy.write_row((secret_hash, credential_proof(pepper, secret_hash, kind, account_id, key_id)))
    conn.execute("UPDATE credential c SET proof = b.proof FROM bound b WHERE b.secret_hash = c.secret_hash")
    conn.execute("CREATE TEMP TABLE proven (account_id uuid, id uuid, proof bytea)")
    with conn.cursor(row_factory=dict_row) as cursor:
        keys = cursor.execute(f"SELECT {', '.join(PROVEN)} FROM api_key".encode()).fetchall()
    with conn.cursor() as cursor, cursor.copy("COPY proven FROM STDIN") as copy:
        for key in keys:
            copy.write_row((key["account_id"], key["id"], key_proof(pepper, key)))
    conn.execute("UPDATE api_key k SET proof = p.proof FROM proven p WHERE k.account_id = p.account_id AND k.id = p.id")
    openings = conn.execute("SELECT account_id, amount_nusd FROM entry WHERE kind = 'adjustment'").fetchall()
    columns = ("id", "admin", "act", "subject", "reason", "amount_nusd")
    with conn.cursor() as cursor, cursor.copy(f"COPY admin_log ({', '.join(columns)}, proof) FROM STDIN") as copy:
        for account_id, amount_nusd in openings:
            act = dict(
                zip(columns, (account_id, "bench", "account.adjust", str(account_id), None, amount_nusd), strict=True)
            )
            unsaid = dict.fromkeys(("before", "after", "request_id"))
            copy.write_row((*act.values(), proof_of(pepper, unsaid | act)))


_OPENING: Final = "1000000000000000::bigint"
_PLANTING: Final = (
    "CREATE TEMP TABLE planted AS SELECT n, gen_random_uuid() AS account_id, gen_random_uuid() AS key_id FROM generate_series(0, %(accounts)s - 1) n",
    f"""INSERT INTO account (id, posted_nusd, entry_count)
        SELECT account_id, {_OPENING} - 45000 * %(each)s::bigint, 1 + %(each)s FROM planted""",
    """INSERT INTO api_key (account_id, id, name, preview, window_start, window_usage_nusd, lifetime_nusd)
       SELECT account_id, key_id, 'bench', 'sk-', now() - interval '1 day', 45000 * %(each)s::bigint, 45000 * %(each)s::bigint FROM planted""",
    """INSERT INTO credential (secret_hash, kind, account_id, key_id)
       SELECT coalesce(m.hash, uuid_send(p.key_id)), 'api_key', p.account_id, p.key_id FROM planted p LEFT JOIN mine m ON m.number = p.n""",
    """INSERT INTO credential (secret_hash, kind, account_id) SELECT uuid_send(account_id), 'credit_id', account_id FROM planted""",
    f"""INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd)
        SELECT account_id, 1, 'adjustment', 'act/' || account_id, 'adjustment', {_OPENING}, {_OPENING} FROM planted""",
    """CREATE TEMP TABLE called AS
       SELECT p.account_id, p.key_id, i, gen_random_uuid() AS hold_id, uuidv7() AS usage_id, now() AS at
       FROM generate_series(1, %(each)s) i CROSS JOIN planted p""",
    f"""INSERT INTO entry (account_id, id, kind, reference, contra, amount_nusd, balance_after_nusd, usage_id, created_at)
        SELECT account_id, 1 + i, 'usage', hold_id::text, 'revenue:usage', -45000, {_OPENING} - 45000 * i::bigint, usage_id, at
        FROM called""",
    f"""INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, window_start, outcome, cost_nusd, balance_after_nusd,
                           held_after_nusd, created_at)
        SELECT c.account_id, c.usage_id, c.hold_id, 'past', c.hold_id::text, c.key_id, k.window_start, 'completed', 45000,
               {_OPENING} - 45000 * c.i::bigint, 0, c.at
        FROM called c JOIN api_key k ON k.account_id = c.account_id""",
)
