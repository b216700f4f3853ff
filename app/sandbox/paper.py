"""The sheet every page is drawn on: the banner, the way around, the look, and the few lines of JavaScript."""

import base64
import hashlib
from datetime import UTC, datetime
from html import escape
from typing import Final

STYLE: Final = """
:root{--bg:#f4f5f7;--card:#fff;--ink:#12161c;--quiet:#5f6b7a;--line:#e3e6ea;--accent:#2f5bea;--soft:#eef2ff;
--ok:#107c4f;--ok-bg:#e3f5ec;--wait:#8a5a00;--wait-bg:#fff1d6;--bad:#b3261e;--bad-bg:#fdeae8}
@media(prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#171b22;--ink:#e9edf2;--quiet:#93a0b0;--line:#2a303a;
--accent:#7d9bff;--soft:#1f2738;--ok:#5fd6a0;--ok-bg:#12301f;--wait:#f0b95a;--wait-bg:#35270d;--bad:#ff8a80;--bad-bg:#3b1715}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.banner{background:repeating-linear-gradient(-45deg,#ffd257 0 14px,#ffc933 14px 28px);color:#3a2a00;text-align:center;
padding:9px 16px;font-weight:600;font-size:14px}
.around{display:flex;gap:18px;max-width:720px;margin:18px auto -14px;padding:0 16px;font-size:14px}.around.wide{max-width:1080px}
.around a{color:var(--quiet)}.around a[aria-current]{color:var(--ink);font-weight:600;text-decoration:none}
main{max-width:720px;margin:32px auto;padding:0 16px}main.wide{max-width:1080px}
h1{font-size:34px;line-height:1.15;margin:0;letter-spacing:-.02em}p{margin:0}.quiet{color:var(--quiet);font-size:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:16px;padding:26px;display:grid;gap:20px;
box-shadow:0 1px 2px #0000000a,0 8px 24px #0000000a}
header{display:flex;justify-content:space-between;gap:16px;align-items:flex-start}
header .quiet{overflow-wrap:anywhere}
.state{display:grid;gap:6px;justify-items:end;text-align:right;flex:none}
b[data-left]{font-variant-numeric:tabular-nums;color:var(--ink)}
.pill{display:inline-block;padding:3px 11px;border-radius:99px;font-size:13px;font-weight:600;white-space:nowrap;
background:var(--soft);color:var(--accent)}
.pill.settled{background:var(--ok-bg);color:var(--ok)}.pill.processing{background:var(--wait-bg);color:var(--wait)}
.pill.expired,.pill.invalid{background:var(--bad-bg);color:var(--bad)}
.ways{display:flex;flex-wrap:wrap;gap:6px;align-items:center}.ways a{padding:6px 13px;border:1px solid var(--line);border-radius:99px;
color:var(--quiet);text-decoration:none;font-size:14px}
.ways a[aria-current]{background:var(--accent);border-color:var(--accent);color:var(--card);font-weight:600}
.pay{display:grid;grid-template-columns:260px 1fr;gap:26px;align-items:start}
.qr{background:#fff;border:1px solid var(--line);border-radius:12px;padding:8px}
.qr svg{display:block;width:100%;height:auto}
.what{display:grid;gap:4px;min-width:0}.label{color:var(--quiet);font-size:13px;margin-top:8px}.label:first-child{margin:0}
.coins{font-size:22px;font-weight:650;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
small{font-weight:400;font-size:14px;color:var(--quiet)}
.copy{position:relative;border:1px solid var(--line);border-radius:10px;background:var(--bg);padding:10px 12px}
code{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.copy code{display:block;max-height:94px;overflow:auto}
button{font:inherit;font-size:14px;font-weight:600;border:1px solid var(--line);background:var(--card);color:var(--ink);
border-radius:10px;padding:9px 14px;cursor:pointer}button:hover{border-color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.copy button{margin-top:8px;padding:5px 12px}
.wallet{margin-top:8px;font-size:14px;color:var(--accent)}
button.main{width:100%;background:var(--accent);border-color:var(--accent);color:var(--card);font-size:17px;padding:13px}
button.main small{color:inherit;opacity:.85}
.verdict{display:flex;gap:16px;align-items:center;padding:20px;border-radius:12px;background:var(--bad-bg);color:var(--bad)}
.verdict a{color:inherit}.verdict svg{width:34px;height:34px;flex:none;fill:none;stroke:currentColor;stroke-width:2;
stroke-linecap:round;stroke-linejoin:round}.verdict.settled{background:var(--ok-bg);color:var(--ok)}
.verdict.processing{background:var(--wait-bg);color:var(--wait)}
table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;color:var(--quiet);font-weight:500}
th,td{padding:9px 8px;border-bottom:1px solid var(--line);overflow-wrap:anywhere}.r{text-align:right;white-space:nowrap}
.card table{border-top:1px solid var(--line)}td a{color:var(--accent)}
main.wide table{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:18px 0}
.controls{margin-top:16px;border:1px dashed var(--quiet);border-radius:12px;padding:12px 16px}
summary{cursor:pointer;font-weight:600;font-size:14px}details>form,details>p{margin-top:12px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:8px;margin-top:12px}
.grid button{width:100%;height:100%}.grid small{display:block;font-size:12px}form{margin:0}.free{display:flex;gap:8px;grid-column:1/-1}.free button{width:auto;flex:none}
input:not([type=hidden]),select{font:inherit;font-size:14px;flex:1;min-width:0;border:1px solid var(--line);border-radius:10px;
padding:9px 12px;background:var(--card);color:var(--ink)}
.problem{background:var(--bad-bg);color:var(--bad);padding:12px 16px;border-radius:12px;margin-bottom:16px}
.told{display:grid;gap:12px}.told label{display:grid;gap:4px;font-size:14px;color:var(--quiet)}h2{font-size:18px;margin:28px 0 0}
@media(max-width:600px){.pay{grid-template-columns:1fr}.qr{max-width:280px;margin:auto}main{margin:24px auto}.card{padding:18px}
h1{font-size:28px}header{flex-wrap:wrap}.state{justify-items:start;text-align:left}
main.wide thead{position:absolute;clip-path:inset(50%)}main.wide tr{display:grid;grid-template-columns:1fr auto;padding:10px 12px;
border-bottom:1px solid var(--line)}main.wide tr:last-child{border:0}main.wide td{border:0;padding:3px 0;text-align:left}
main.wide td.r{text-align:right}main.wide td.long{grid-column:1/-1}}
"""

SCRIPT: Final = """
const main=document.querySelector("main[data-invoice]");
for(const b of document.querySelectorAll("[data-copy]")){b.hidden=false;b.onclick=async()=>{
 try{await navigator.clipboard.writeText(document.getElementById(b.dataset.copy).textContent);b.textContent="Copied"}
 catch{getSelection().selectAllChildren(document.getElementById(b.dataset.copy));b.textContent="Press Ctrl+C"}
 setTimeout(()=>b.textContent="Copy",2000)}}
for(const t of document.querySelectorAll("[data-at]")){t.title=t.textContent;
 t.textContent=new Date(t.dataset.at*1000).toLocaleString()}
const left=document.querySelector("[data-left]"),end=left&&Date.now()+left.dataset.left*1000;
const show=()=>{const s=Math.max(0,Math.round((end-Date.now())/1000)),h=Math.floor(s/3600),m=Math.floor(s/60)%60;
 left.textContent=(h?h+":"+String(m).padStart(2,"0"):m)+":"+String(s%60).padStart(2,"0")};
if(left){show();setInterval(show,1000)}
const open=document.querySelector("details"),key="sandbox-controls";
if(open){open.open=sessionStorage[key]!=="0";open.ontoggle=()=>sessionStorage[key]=open.open?"1":"0"}
if(main)setInterval(async()=>{try{const r=await fetch(location.pathname+"/status");
 if(r.ok&&(await r.json()).mark!==main.dataset.mark&&!document.querySelector("input:focus"))location.replace(
 location.href)}catch{}},2000);
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS: Final = {
    "Content-Security-Policy": f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; img-src data:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
"""What goes with every page: it runs nothing that is not of this file."""


def page(title: str, main: str, *, root: str = "", here: str = "", is_wide: bool = False) -> str:
    """A whole HTML document; `title` and `main` are HTML already. `root` leads from its address to the list's, `here` is
    the way that is being gone."""
    ways = "".join(
        f"<a href='{root or './'}{path}'{' aria-current=page' if name == here else ''}>{name}</a>"
        for name, path in (("Invoices", ""), ("Wallet", "wallet"), ("Notices", "notices"))
    )
    wide = " wide" if is_wide else ""
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>{title} · Sandbox</title><link rel=icon href="data:,"><style>{STYLE}</style>
<noscript><meta http-equiv=refresh content=10></noscript></head>
<body><div class=banner role=note>Sandbox: no real money. Nothing here touches a public network, do not send coins.</div>
<nav class="around{wide}" aria-label="The sandbox's pages">{ways}</nav>{main}<script>{SCRIPT}</script></body></html>"""


def copied(text: str, id: str, what: str) -> str:
    """A text with a button that copies it."""
    return f"""<div class=copy><code id={id} tabindex=0>{escape(text)}</code>
<button type=button data-copy={id} aria-label="Copy {what}" hidden>Copy</button></div>"""


def moment(at: int) -> str:
    """A time in UTC, until the page puts it into its reader's zone. `at` is in unix seconds."""
    return f"<time data-at={at}>{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M UTC}</time>"
