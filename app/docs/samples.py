"""Each operation as something to paste: a command, a few lines of Python, a few of JavaScript."""

import json
import re
from pprint import pformat
from typing import Final

from app.docs.schema import body_of
from app.docs.words import CREDENTIALS, Json

LANGUAGES: Final = ("Shell", "Python", "JavaScript")


def samples(document: Json, path: str, method: str, operation: Json) -> list[dict[str, str]]:
    """As `x-codeSamples`, which documentation tools know."""
    written = (curl, python, javascript)
    return [
        {"lang": language, "source": write(document, path, method, operation)}
        for language, write in zip(LANGUAGES, written, strict=True)
    ]


def curl(document: Json, path: str, method: str, operation: Json) -> str:
    """The operation as a command to paste."""
    url = _url(document, path, operation, "${}")
    parts = [f"curl {f'-X {method} ' if method != 'GET' else ''}" + (f'"{url}"' if "$" in url else url)]
    parts += [f'-H "{name}: {before}${secret}"' for name, before, secret in _credential(operation)]
    if "requestBody" in operation:
        body = json.dumps(body_of(operation)["example"], ensure_ascii=False)
        parts += ['-H "Content-Type: application/json"', f"-d '{body}'"]
    return " \\\n  ".join(parts)


def python(document: Json, path: str, method: str, operation: Json) -> str:
    """With httpx. Numbers with a point are read as Decimal: no money through a float."""
    url = _url(document, path, operation, "{{{}}}")
    arguments = [f'{"f" * ("{" in url)}"{url}"']
    for name, before, secret in _credential(operation):
        value = f'f"{before}{{{secret}}}"' if before else secret
        arguments.append(f'headers={{"{name}": {value}}}')
    if "requestBody" in operation:
        arguments.append("json=" + pformat(body_of(operation)["example"], width=70, sort_dicts=False))
    inside = ",\n    ".join(each.replace("\n", "\n    ") for each in arguments)
    return (
        f"from decimal import Decimal\n\nimport httpx\n\nanswer = httpx.{method.lower()}(\n    {inside},\n)\n"
        + _read_in_python(operation)
    )


def _read_in_python(operation: Json) -> str:
    read = "answer.json(parse_float=Decimal)" if _answers_json(operation) else "answer.text"
    return f"answer.raise_for_status()\nprint({read})"


def javascript(document: Json, path: str, method: str, operation: Json) -> str:
    """With fetch, which browsers and Node have."""
    url = _url(document, path, operation, "${{{}}}")
    options = [] if method == "GET" else [f'method: "{method}"']
    headers = [
        f'"{name}": ' + (f"`{before}${{{secret}}}`" if before else secret)
        for name, before, secret in _credential(operation)
    ]
    if "requestBody" in operation:
        headers.append('"Content-Type": "application/json"')
        body = json.dumps(body_of(operation)["example"], ensure_ascii=False, indent=2).replace("\n", "\n  ")
    options += [f"headers: {{{', '.join(headers)}}}"] if headers else []
    options += [f"body: JSON.stringify({body})"] if "requestBody" in operation else []
    lines = ",\n  ".join(options)
    inside = f", {{\n  {lines}\n}}" if options else ""
    quoted = f"`{url}`" if "${" in url else f'"{url}"'
    read = "json" if _answers_json(operation) else "text"
    return f"const answer = await fetch({quoted}{inside});\nif (!answer.ok) throw new Error(await answer.text());\nconsole.log(await answer.{read}());"


def header(scheme: str) -> str:
    """`x-credit-id: $CREDIT_ID`, or `Authorization: Bearer $API_KEY`."""
    name, before, secret = _header(scheme)
    return f"{name}: {before}${secret}"


def _header(scheme: str) -> tuple[str, str, str]:
    """The header's name, what stands before the secret, and the secret's name."""
    name, _, how = CREDENTIALS[scheme]
    before = "Bearer " if how["type"] == "http" else ""
    return how.get("name", "Authorization"), before, name.upper().replace(" ", "_")


def _credential(operation: Json) -> list[tuple[str, str, str]]:
    if not operation["security"] or {} in operation["security"]:
        return []
    return [_header(next(iter(operation["security"][0])))]


def _url(document: Json, path: str, operation: Json, variable: str) -> str:
    """The whole address; what has no example stands as a `variable`."""
    shown = {one["name"]: one.get("example", variable.format(one["name"].upper())) for one in operation["parameters"]}
    base: str = document["servers"][0]["url"]
    return base.rstrip("/") + re.sub(r"\{(\w+)\}", lambda match: str(shown[match[1]]), path)


def _answers_json(operation: Json) -> bool:
    answer = next(one for status, one in operation["responses"].items() if status.startswith("2"))
    return "application/json" in answer.get("content", {"application/json": {}})
