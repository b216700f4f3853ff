"""The price files of others as their packages carry them, where those are installed. Nothing of the packages is run."""

import ast
import json
from datetime import date, time
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@cache
def litellm_map() -> bytes:
    return (_package("litellm") / "model_prices_and_context_window_backup.json").read_bytes()


@cache
def genai_data() -> bytes:
    """Its data module as the JSON that the project publishes: what it calls is what an object is, by its arguments."""
    tree = ast.parse((_package("genai_prices") / "data.py").read_text())
    (found,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign))
    return json.dumps({"units": {}, "providers": _plain(found)}).encode()


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps -r deploy/requirements-prices.txt")
    return Path(spec.origin).parent


def _plain(node: Any) -> Any:
    if isinstance(node, ast.List):
        return [_plain(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        return {_plain(key): _plain(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Call):
        return _built(node)
    return ast.literal_eval(node)


class _Number(float):
    """A decimal that JSON writes as its text has it."""

    def __new__(cls, text: str) -> "_Number":
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str

    def __repr__(self) -> str:
        return self.text


def _built(node: ast.Call) -> Any:
    name = ast.unparse(node.func)
    if name == "Decimal":
        text = str(ast.literal_eval(node.args[0]))
        assert Decimal(text) == Decimal(repr(_Number(text)))
        return _Number(text)
    if name == "datetime.date":
        return date(*map(ast.literal_eval, node.args)).isoformat()
    if name == "datetime.time":
        return time(*map(ast.literal_eval, node.args)).isoformat() + "Z"
    return {keyword.arg.rstrip("_"): _plain(keyword.value) for keyword in node.keywords if keyword.arg}
