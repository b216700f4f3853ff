"""The operator's commands: the same verbs as the admin API, as tables and as JSON, with exit codes and a question first."""

import getpass
import io
import json
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.cli import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Shell:
    """A shell in which the service's settings are those of the test's database."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        self._capsys, self._monkeypatch, self._url = capsys, monkeypatch, url

    def __call__(self, *words: str, code: int = 0) -> tuple[str, str]:
        self._capsys.readouterr()
        assert main(words) == code, self._capsys.readouterr().err
        return tuple(self._capsys.readouterr())  # type: ignore[return-value]

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json")[0])

    def typing(self, text: str, *words: str, code: int = 0) -> tuple[str, str]:
        """On a terminal, where somebody answers."""
        self._capsys.readouterr()
        shown = Terminal()
        self._monkeypatch.setattr(sys, "stdin", Terminal(text))
        self._monkeypatch.setattr(sys, "stderr", shown)
        try:
            assert main(words) == code
        finally:
            self._monkeypatch.undo()
            _settings(self._monkeypatch, self._url)
        return self._capsys.readouterr().out, shown.getvalue()


FOLDER: list[str] = []


def _settings(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in (
        ("DATABASE_URL", url),
        ("DATA_DIR", FOLDER[-1]),
        ("LOG_LEVEL", "ERROR"),
        ("ENVIRONMENT", "development"),
    ):
        monkeypatch.setenv(name, value)


@pytest.fixture
def shell(clean: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    FOLDER.append(str(tmp_path))
    _settings(monkeypatch, clean)
    return Shell(capsys, monkeypatch, clean)


def test_an_account_from_its_opening_to_its_end(shell: Shell) -> None:
    made = shell.json("account", "create")
    account = made["account_id"]
    assert account in shell("account", "list")[0]
    for asked in (account, made["credit_id"], made["api_key"], f"{made['api_key'][:6]}...{made['api_key'][-4:]}"):
        assert [each["account_id"] for each in shell.json("account", "search", asked)["accounts"]] == [account]
    tried = shell.json("account", "credit", account, "5", "--reason", "goodwill", "--dry-run")
    assert (tried["balance_usd"], tried["reference"]) == ("5", None)
    assert shell("account", "credit", account, "5", "--reason", "goodwill")[0] == "The balance went from 0 to 5 USD.\n"
    assert shell.json("account", "freeze", account, "--reason", "odd calls")["status"] == "frozen"
    assert shell.json("account", "unfreeze", account)["status"] == "active"
    assert "more than the $5" in shell("account", "debit", account, "6", "--reason", "paid back", "--yes", code=2)[1]
    assert "$5" in shell("account", "close", account, "--yes", code=2)[1]
    shell("account", "debit", account, "5", "--reason", "paid back", "--yes")
    rotated = shell.json("account", "rotate", account, "--yes", "--reason", "leaked")
    assert shell.json("account", "search", made["credit_id"])["accounts"] == []
    assert len(shell.json("account", "search", rotated["credit_id"])["accounts"]) == 1
    shown = shell.json("account", "show", account)
    assert [(each["kind"], each["amount_usd"]) for each in shown["entries"]] == [
        ("adjustment", "-5"),
        ("adjustment", "5"),
    ]
    assert shell.json("account", "close", account, "--yes")["status"] == "closed"
    acts = shell.json("log", "--target", account)["acts"]
    assert [each["act"] for each in acts] == [
        "account.close", "account.rotate", "account.debit", "account.unfreeze", "account.freeze", "account.credit", "account.create",
    ]  # fmt: skip
    assert {each["actor"] for each in acts} == {f"cli:{getpass.getuser()}"}
    assert "goodwill" in shell("log", "--act", "account.credit")[0]
    assert shell.json("stats")["liabilities_usd"] == "0"
    assert "liabilities_usd" in shell("stats")[0]
    assert "nothing differs" in shell("audit")[0]


def test_a_key_is_made_set_switched_off_and_revoked(shell: Shell) -> None:
    account = shell.json("account", "create")["account_id"]
    made = shell.json("key", "create", account, "ours", "--limit", "5", "--period", "daily", "--per-minute", "60", "--scopes", "spend,balance")  # fmt: skip
    assert (made["limit_usd"], made["period"], made["requests_per_minute"], made["scopes"]) == ("5", "day", 60, ["spend", "balance"])  # fmt: skip
    changed = shell.json("key", "set", account, made["id"], "--limit", "7", "--name", "theirs", "--per-call", "0.5", "--scopes", "all")  # fmt: skip
    assert (changed["limit_usd"], changed["name"], changed["max_usd_per_call"], changed["scopes"]) == ("7", "theirs", "0.5", None)  # fmt: skip
    assert shell.json("key", "disable", account, made["id"])["state"] == "disabled"
    assert shell.json("key", "set", account, made["id"], "--enable")["state"] == "live"
    shell("key", "revoke", account, made["id"], "--yes")
    assert [each["state"] for each in shell.json("key", "list", account)["keys"]] == ["live", "revoked"]
    for wrong in (
        ("set", account, made["id"]), ("set", account, made["id"], "--limit", "0"), ("create", account, "k", "--period", "daily"),
        ("create", account, "k", "--scopes", "x"), ("create", account, "k", "--expires", "yesterday"), ("list", "none"),
    ):  # fmt: skip
        assert len(shell("key", *wrong, code=2)[1].splitlines()) == 1, wrong


def test_a_token_is_made_listed_and_revoked(shell: Shell) -> None:
    made = shell.json("token", "create", "--admin", "night-shift", "--scopes", "read,support", "--expires-in", "7")
    assert made["token"].startswith("adm-")
    assert made["expires_at"] is not None
    assert shell.json("token", "create", "--service", "proxy")["expires_at"] is None
    assert shell.json("token", "create", "--admin", "root", "--expires-in", "never")["expires_at"] is None
    found = {each["name"]: each for each in shell.json("token", "list")["tokens"]}
    assert found["night-shift"]["scopes"] == ["read", "support"]
    assert found["night-shift"]["last_used_at"] is None
    assert made["token"] not in shell("token", "list")[0]
    shell("token", "revoke", found["night-shift"]["id"], "--yes")
    assert [each["name"] for each in shell.json("token", "list", "--state", "revoked")["tokens"]] == ["night-shift"]
    for wrong in (
        ("create", "--admin", "x", "--expires-in", "0"),
        ("create", "--admin", "x", "--scopes", "all,most"),
        ("create", "--admin", "X"),
    ):
        assert len(shell("token", *wrong, code=2)[1].splitlines()) == 1, wrong


def test_prices_that_are_changed_by_a_command_stand_in_the_log(shell: Shell) -> None:
    shell("prices", "fee", "web", "0.02")
    [act] = shell.json("log")["acts"]
    assert (act["act"], act["actor"], act["after"]["price_usd"]) == ("prices.fee", f"cli:{getpass.getuser()}", "0.02")


def test_topups_that_are_none_are_told_in_words(shell: Shell) -> None:
    assert shell("topup", "list")[0] == shell("topup", "unapplied")[0] == "There is none.\n"
    assert shell.json("topup", "list", "--state", "all") == {"topups": []}
    missing = "01980000-0000-7000-8000-000000000000"
    for words in (("reconcile", missing), ("resolve", missing, "dismiss", "--reason", "nothing")):
        assert len(shell("topup", *words, code=2)[1].splitlines()) == 1


def test_what_cannot_be_undone_is_asked_about_and_refused_where_nobody_could_answer(
    shell: Shell, owner_conn: psycopg.Connection[Any]
) -> None:
    account = shell.json("account", "create")["account_id"]
    key = shell.json("key", "list", account)["keys"][0]["id"]
    shell("account", "credit", account, "5", "--reason", "goodwill")
    token = shell.json("token", "create", "--service", "proxy") and shell.json("token", "list")["tokens"][0]["id"]
    for words in (
        ("account", "close", account), ("account", "rotate", account), ("account", "debit", account, "1", "--reason", "why"),
        ("key", "revoke", account, key), ("token", "revoke", token),
    ):  # fmt: skip
        acts = owner_conn.execute("SELECT count(*) FROM admin_log").fetchall()
        said = shell(*words, code=2)[1]
        assert len(said.splitlines()) == 1
        assert "--yes" in said, words
        said = shell.typing("n\n", *words, code=2)[1]
        assert "Go on? [y/N]" in said, words
        assert "nothing was done" in said, words
        assert owner_conn.execute("SELECT count(*) FROM admin_log").fetchall() == acts
    assert "went from 5 to 4" in shell.typing("y\n", "account", "debit", account, "1", "--reason", "why")[0]
    assert "would go" in shell("account", "debit", account, "1", "--reason", "why", "--dry-run")[0]
