"""The pages made from the document: `/docs` for people, `/llms.txt` for agents. They load nothing else."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import Final

from app.docs.contract import callers, operations, tag_of
from app.docs.guides import GUIDES
from app.docs.samples import header
from app.docs.schema import body_of, every_error, example, meaning, pointed
from app.docs.words import CREDENTIALS, GUIDE, ONCE, TAGS, WHAT, Json
from app.kernel.errors import InsufficientBalance

STYLE: Final = """
:root{color-scheme:light dark;--bg:#f4f5f7;--card:#fff;--ink:#12161c;--quiet:#5f6b7a;--line:#e3e6ea;--accent:#2f5bea;
--soft:#eef2ff;--code:#f6f7f9;--get:#107c4f;--post:#2f5bea;--patch:#8a5a00;--delete:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#171b22;--ink:#e9edf2;--quiet:#93a0b0;--line:#2a303a;
--accent:#7d9bff;--soft:#1f2738;--code:#10141a;--get:#5fd6a0;--post:#7d9bff;--patch:#f0b95a;--delete:#ff8a80}}
*{box-sizing:border-box}html{scroll-padding-top:16px}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}:focus-visible{outline:2px solid var(--accent)}
code,pre,.verb{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}code{overflow-wrap:anywhere}
.page{display:grid;grid-template-columns:290px minmax(0,1fr);max-width:1360px;margin:auto}
nav{position:sticky;top:0;height:100vh;overflow:auto;padding:24px 16px 24px 20px;border-right:1px solid var(--line)}
nav b{display:block;font-size:19px;letter-spacing:-.01em}nav small,.quiet{color:var(--quiet)}
nav h4{margin:20px 0 4px;font-size:12px;letter-spacing:.06em;text-transform:uppercase;color:var(--quiet)}
nav a.to{display:flex;gap:8px;align-items:baseline;padding:3px 8px;margin-left:-8px;border-radius:7px;color:var(--ink);font-size:14px}
nav a.to:hover{background:var(--soft);text-decoration:none}nav .verb{width:46px;flex:none;font-size:10.5px}
input{width:100%;font:inherit;font-size:14px;margin-top:14px;padding:8px 12px;border:1px solid var(--line);border-radius:10px;
background:var(--card);color:var(--ink)}
main{padding:28px 32px 80px;min-width:0}main.alone{max-width:720px;margin:auto;padding-top:64px}
h1{font-size:32px;line-height:1.15;letter-spacing:-.02em;margin:0 0 10px}h2{font-size:23px;letter-spacing:-.01em;margin:52px 0 2px}
h3{display:flex;flex-wrap:wrap;gap:6px 12px;align-items:baseline;margin:0;font-size:18px}h3 code{font-size:15px;font-weight:600}
h5{margin:18px 0 4px;font-size:12.5px;color:var(--quiet);font-weight:600}p{margin:8px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px 22px;margin-top:16px}
.split{display:grid;grid-template-columns:minmax(0,1.25fr) minmax(0,1fr);gap:8px 28px;align-items:start}
.verb{font-weight:700;font-size:12px}.get{color:var(--get)}.post{color:var(--post)}.patch,.put{color:var(--patch)}.delete{color:var(--delete)}
.pill{display:inline-block;padding:1px 10px;border-radius:99px;font-size:12.5px;font-weight:600;background:var(--soft);color:var(--accent)}
.pill.open{background:var(--code);color:var(--quiet)}h3 .name{margin-left:auto;font-weight:400;font-size:12.5px;color:var(--quiet)}
table{border-collapse:collapse;width:100%;font-size:13.5px}td,th{padding:6px 10px 6px 0;border-top:1px solid var(--line);
text-align:left;vertical-align:top}tr:first-child td{border-top:0}td:first-child{width:36%}td .quiet{font-size:12.5px}
.must{color:var(--delete);font-size:11.5px;font-weight:600;white-space:nowrap}
.code{position:relative;margin-top:4px}pre{margin:0;padding:12px 64px 12px 14px;background:var(--code);border:1px solid var(--line);border-radius:10px;
overflow:auto;max-height:340px;white-space:pre-wrap;overflow-wrap:anywhere}p code,td code{background:var(--code);border-radius:5px;padding:1px 4px}
button{position:absolute;top:6px;right:6px;font:600 12px system-ui,sans-serif;border:1px solid var(--line);border-radius:7px;
background:var(--card);color:var(--ink);padding:3px 9px;cursor:pointer}button:hover{border-color:var(--accent)}
.codes{line-height:1.9}.codes a{margin-right:10px}.codes b{font-size:12px;color:var(--quiet);margin-right:6px}.codes span{display:inline-block;margin-right:8px}
details{margin-top:8px}summary{cursor:pointer;font-size:12.5px;color:var(--quiet);font-weight:600}
td p{margin:0}td:first-child code{background:none;padding:0}.card>h5:first-child{margin-top:0}.split>div+div{position:sticky;top:8px}[hidden]{display:none!important}
@media(max-width:1080px){.split{grid-template-columns:minmax(0,1fr)}.split>div+div{position:static}}
@media(max-width:760px){.page{display:block}nav{position:static;height:auto;border:0;padding:20px 16px 0}nav div{max-height:38vh;overflow:auto;
border:1px solid var(--line);border-radius:12px;padding:0 18px 10px;margin-top:12px;background:var(--card)}nav h4{margin-top:14px}
main{padding:16px 16px 60px}.card{padding:16px}h1{font-size:27px}h3 .name{display:none}td:first-child{width:42%}}
"""
SCRIPT: Final = """
const find=document.querySelector("input"),all=[...document.querySelectorAll("[data-find]")];find.hidden=false;
const sift=()=>{const words=find.value.toLowerCase().split(/\\s+/);
 for(const one of all)one.hidden=!words.every(word=>one.dataset.find.includes(word));
 for(const g of document.querySelectorAll("[data-group]"))g.hidden=!g.querySelector("[data-find]:not([hidden])")};
find.oninput=sift;sift();
document.onkeydown=k=>{if(k.key==="/"&&document.activeElement!==find){k.preventDefault();find.focus()}};
for(const b of document.querySelectorAll("button")){b.hidden=false;b.onclick=async()=>{const text=b.previousElementSibling;
 try{await navigator.clipboard.writeText(text.textContent);b.textContent="Copied"}
 catch{getSelection().selectAllChildren(text);b.textContent="Press Ctrl+C"}setTimeout(()=>b.textContent="Copy",2000)}}
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY: Final = (
    f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)


def _html(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>{title}</title><link rel=icon href="data:,"><style>{STYLE}</style></head>
<body>{body}</body></html>"""


def reference_page(document: Json) -> str:
    groups: dict[str, list[tuple[str, str, Json]]] = {}
    for one in operations(document):
        groups.setdefault(tag_of(one[2]), []).append(one)
    index = "".join(
        f"<section data-group><h4>{escape(tag)}</h4>{''.join(_link(*one) for one in inside)}</section>"
        for tag, inside in groups.items()
    )
    chapters = "".join(
        f"<section data-group><h2>{escape(tag)}</h2><p class=quiet>{escape(TAGS.get(tag, ''))}</p>"
        + "".join(_operation(document, *one) for one in inside) + "</section>"
        for tag, inside in groups.items()
    )  # fmt: skip
    info = document["info"]
    return _html(
        "Satmeter API",
        f"""<div class=page><nav><b>Satmeter</b><small>API {escape(info["version"])} ·
<a href=/openapi.json>openapi.json</a> · <a href=/llms.txt>llms.txt</a></small>
<input type=search placeholder="Filter (press /)" aria-label="Filter the operations" autocomplete=off hidden>
<div><section><h4>Guides</h4>{"".join(f"<a class=to href=#{one.id}>{escape(one.title)}</a>" for one in GUIDES)}</section>
{index}<section><h4>Reference</h4><a class=to href=#credentials>Credentials</a><a class=to href=#errors>Errors</a></section></div></nav>
<main><h1>Satmeter API</h1>{prose(info["description"])}{_guides(document)}{_credentials()}{chapters}{_errors()}</main></div><script>{SCRIPT}</script>""",
    )


def _guides(document: Json) -> str:
    """What to do first, before what there is."""
    url = document["servers"][0]["url"].rstrip("/")
    cards = "".join(
        f"<section class=card id={one.id}><h3>{escape(one.title)}</h3>{prose(one.about)}"
        + "".join(f"<h5>{escape(step.title)}</h5>{_copied(step.code.replace('$BASE', url))}{prose(step.after)}" for step in one.steps)
        + "</section>"
        for one in GUIDES
    )  # fmt: skip
    return f"<h2>Guides</h2><p class=quiet>Each from nothing to something that works, to paste.</p>{cards}<h2>Reference</h2>"


def _link(path: str, method: str, operation: Json) -> str:
    return (
        f'<a class=to href="#{operation["operationId"]}" data-find="{_findable(path, method, operation)}">'
        f"{_verb(method)}<span>{escape(operation['summary'])}</span></a>"
    )


def _verb(method: str) -> str:
    return f"<span class='verb {method.lower()}'>{method}</span>"


def _findable(path: str, method: str, operation: Json) -> str:
    words = (method, path, operation["operationId"], operation["summary"], tag_of(operation), *callers(operation))
    return escape(" ".join(words).lower())


def prose(text: str) -> str:
    """Paragraphs, with `code`."""
    return "".join(f"<p>{_coded(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph)


def _coded(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _operation(document: Json, path: str, method: str, operation: Json) -> str:
    schemas, name = document["components"]["schemas"], operation["operationId"]
    kind = "pill" if operation["security"] else "pill open"
    who = "".join(f"<span class='{kind}'>{escape(one)}</span> " for one in callers(operation))
    answer = next(one for status, one in operation["responses"].items() if status.startswith("2"))
    samples = _try_it(operation["x-codeSamples"])
    for media in answer.get("content", {}).values():
        if "$ref" in json.dumps(media["schema"]):
            samples += _code("Answers", json.dumps(example(media["schema"], schemas), indent=2, ensure_ascii=False))
    return f"""<section class=card id="{name}" data-find="{_findable(path, method, operation)}">
<h3>{_verb(method)}<code>{escape(path)}</code>{who}<a class=name href="#{name}">{name}</a></h3>
<p><strong>{escape(operation["summary"])}</strong></p>{prose(operation["description"])}
<div class=split><div>{"".join(_tables(operation, schemas))}{_refused(operation)}</div><div>{samples}</div></div></section>"""


def _tables(operation: Json, schemas: Json) -> Iterator[str]:
    """What goes in, and what comes out."""
    for place, title in (("path", "In the path"), ("query", "In the query"), ("header", "In the header")):
        rows = [one for one in operation["parameters"] if one["in"] == place]
        yield _table(
            title, ((one["name"], one["schema"] | {"description": one["description"]}, one["required"]) for one in rows)
        )
    if "requestBody" in operation:
        title = "Body" if operation["requestBody"]["required"] else "Body, may be left out"
        yield _table_of(title, body_of(operation)["schema"], schemas)
    status, answer = next(one for one in operation["responses"].items() if one[0].startswith("2"))
    for media in answer.get("content", {}).values():
        kinds = media["schema"].get("oneOf", [media["schema"]])
        for kind in kinds:
            which = f": {kind['$ref'].rpartition('/')[2]}" if len(kinds) > 1 and "$ref" in kind else ""
            yield _table_of(f"Answer {status}{which}", kind, schemas)


def _table_of(title: str, schema: Json, schemas: Json) -> str:
    about = pointed(schema, schemas).get("description", "") if "$ref" in schema else ""
    return _table(title, fields(schema, schemas), about)


def fields(schema: Json, schemas: Json, before: str = "", depth: int = 0) -> Iterator[tuple[str, Json, bool]]:
    """Name, schema and whether it must be there, for every field, with those inside it as `data[].name`."""
    outer = pointed(_inside(schema)[1], schemas)
    for name, one in outer.get("properties", {}).items():
        step, inner = _inside(one)
        is_open = "$ref" in inner and depth < 3
        if not is_open or step != ".":
            yield before + name, one, name in outer.get("required", ())
        if is_open:
            yield from fields(inner, schemas, before + name + step, depth + 1)


def _inside(schema: Json) -> tuple[str, Json]:
    """Where the fields of a value are: in itself, in what it is if it is not null, in its items, in its values."""
    kinds = [schema, *schema.get("oneOf", ())]
    for kind in kinds:
        items, values = kind.get("items"), kind.get("additionalProperties")
        for step, inner in ((".", kind), ("[].", items), (".*.", values)):
            if isinstance(inner, dict) and "$ref" in inner:
                return step, inner
    return ".", schema


def _table(title: str, rows: Iterable[tuple[str, Json, bool]], about: str = "") -> str:
    is_answer = title.startswith("Answer")
    must_be, may_be = ("", ", may be absent") if is_answer else (" <span class=must>required</span>", "")
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code>{must_be if must else ''}</td><td>{_coded(one.get('description', ''))}"
        f" <span class=quiet>{escape(kind_of(one))}{'' if must else may_be}</span></td></tr>"
        for name, one, must in rows
    )
    return f"<h5>{escape(title)}</h5>{prose(about)}<table>{cells}</table>" if cells else ""


_FORMATS: Final = {"date-time": ", ISO 8601", "uuid": ", UUID", "decimal": ", exact decimal"}


def kind_of(schema: Json) -> str:
    """The type in a few words: "integer, 1 to 100, default 50"."""
    if "oneOf" in schema:
        return " or ".join(kind_of(one) for one in schema["oneOf"])
    kinds = schema.get("type", "any")
    words = kinds if isinstance(kinds, str) else " or ".join(kinds)
    if "enum" in schema:
        words = " | ".join(json.dumps(value) for value in schema["enum"])
    elif "items" in schema and "$ref" not in schema["items"]:
        words = f"array of {kind_of(schema['items']).split(',')[0]}"
    words += _FORMATS.get(schema.get("format", ""), "")
    for least, most, unit in (("minimum", "maximum", ""), ("minLength", "maxLength", " characters")):
        if most in schema:
            words += f", {schema.get(least, 0)} to {schema[most]}{unit}"
    return words + (f", default {json.dumps(schema['default'])}" if schema.get("default") is not None else "")


def _code(title: str, text: str) -> str:
    return f"<h5>{title}</h5>{_copied(text)}"


def _copied(text: str) -> str:
    return f"<div class=code><pre tabindex=0>{escape(text)}</pre><button hidden>Copy</button></div>"


def _try_it(samples: Iterable[dict[str, str]]) -> str:
    """The command; the other languages behind their names."""
    shell, *others = samples
    rest = "".join(f"<details><summary>{one['lang']}</summary>{_copied(one['source'])}</details>" for one in others)
    return _code("Try it", shell["source"]) + rest


def _refused(operation: Json) -> str:
    verdicts = operation.get("x-verdicts")
    said = f"<h5>Verdicts, in a 200 that denies</h5><p class=codes>{_codes(verdicts)}</p>" if verdicts else ""
    by_status = "".join(
        f"<span><b>{status}</b>{_codes(response['x-codes'])}</span>"
        for status, response in operation["responses"].items() if "x-codes" in response
    )  # fmt: skip
    return f"{said}<h5>Errors</h5><p class=codes>{by_status}</p>"


def _codes(codes: Iterable[str]) -> str:
    return "".join(f'<a href="#error-{code}"><code>{code}</code></a>' for code in codes)


def _credentials() -> str:
    rows = "".join(
        f"<tr><td><strong>{escape(name)}</strong><br><code>{escape(header(scheme))}</code></td><td>{prose(about)}</td></tr>"
        for scheme, (name, about, _) in CREDENTIALS.items()
    )
    return f"<section class=card id=credentials><h3>Credentials</h3><table>{rows}</table></section>"


def _errors() -> str:
    rows = "".join(
        f'<tr id="error-{code}"><td><code>{code}</code></td><td>{error.status}</td><td>{prose(meaning(error))}'
        f"<span class=quiet>{error.type}</span></td></tr>"
        for code, error in every_error().items()
    )
    body = {"error": InsufficientBalance("…").wire(), "message": "…", "statusCode": InsufficientBalance.status}
    return f"""<h2 id=errors>Errors</h2><p class=quiet>One body for every refusal. Decide by <code>error.code</code>; 402 never means
wait, and 429 never means that there is no money. 429 and 503 come with <code>Retry-After</code>.</p>
<div class=card>{_code("The body", json.dumps(body, indent=2, ensure_ascii=False))}<h5>The codes</h5><table>{rows}</table></div>"""


# --- for agents ---------------------------------------------------------------------------------------


def guide(document: Json) -> str:
    """`/llms.txt`: the contract in a page that fits any context."""
    parts: dict[str, list[tuple[str, str, Json]]] = {}
    for path, method, operation in operations(document):
        if not path.startswith(("/admin", "/webhooks")):
            parts.setdefault(tag_of(operation), []).append((path, method, operation))
    lines = {}
    for tag, inside in parts.items():
        who = {" or ".join(callers(operation)) for *_, operation in inside}
        only = f" ({who.pop()})" if len(who) == 1 else ""  # then it need not stand in each line
        lines[f"\n### {tag}{only}"] = [_line(document, *each, is_whose=not only) for each in inside]
    start = GUIDE.format(what=WHAT, url=document["servers"][0]["url"], codes=", ".join(every_error()))
    return start + "\n".join(line for tag, inside in lines.items() for line in (tag, *inside)) + "\n"


def _line(document: Json, path: str, method: str, operation: Json, *, is_whose: bool) -> str:
    parameters, body = operation["parameters"], ""
    if "requestBody" in operation:
        inside = fields(body_of(operation)["schema"], document["components"]["schemas"], depth=3)
        body = " {" + ", ".join(name + "!" * must for name, _, must in inside) + "}"
    once = "*" if any(one["name"] == ONCE["name"] for one in parameters) else ""
    query = ",".join(one["name"] for one in parameters if one["in"] == "query")
    asked = f"{method}{once} {path}{'?' if query else ''}{query}{body}"
    return f"- {asked}: {operation['summary']}" + (f" ({' or '.join(callers(operation))})" if is_whose else "")
