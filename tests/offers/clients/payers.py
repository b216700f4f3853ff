"""Released L402 clients as their users call them, over the sandbox's wallet. It runs in a virtual environment of their own.

Tells a JSON object: by client, what each of its calls was answered.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import bolthub.client
import l402
import l402_requests
import pyl402.client
from bolthub.wallets import NwcWallet as BolthubWallet
from pyl402.token_store.token_store import MemoryTokenStore
from pyl402.wallet.wallet import PaymentResult, Wallet

ACCOUNT, MODEL, NWC = os.environ["ACCOUNT_URL"], os.environ["MODEL_URL"], os.environ["NWC_URL"]
KEYS = json.loads(os.environ["KEYS"])
WISH, CALL = json.loads(os.environ["WISH"]), json.loads(os.environ["CALL"])


def pay(invoice: str) -> str:
    """By the wallet that l402-requests brings: a real NIP-47 client. The preimage, hex."""
    return str(asyncio.run(l402_requests.NwcWallet(NWC).pay_invoice(invoice)))


class ByWallet(Wallet):  # type: ignore[misc]  # it has no types
    def pay_invoice(self, invoice: str) -> PaymentResult:
        return PaymentResult(pay(invoice), True)


class Lnd(BaseHTTPRequestHandler):
    """Lightning Labs' client pays by a node's REST interface: so much of LND as it asks."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        preimage = pay(asked["payment_request"])
        told = {
            "status": "SUCCEEDED", "payment_preimage": preimage, "payment_hash": hashlib.sha256(bytes.fromhex(preimage)).hexdigest(),
            "value_sat": "1", "fee_sat": "0", "fee_msat": "0",
        }  # fmt: skip
        body = json.dumps({"result": told}).encode() + b"\n"
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing but the answer is told."""


def both(name: str, post: Callable[..., Any]) -> list[Any]:
    """No account: one is bought. A key without money: the model is called with it beside, twice."""
    made = served(lambda: post(ACCOUNT, {}, WISH))
    called = [served(lambda: post(MODEL, {"x-api-key": KEYS[name]}, CALL)) for _ in range(2)]
    return [made, *called]


def served(ask: Callable[[], list[Any]]) -> list[Any]:
    """A service that is busy may offer nothing in time, or not know of a payment yet; whoever is told so asks again."""
    for _ in range(5):
        answer = ask()
        if answer[0] not in (402, 503):
            break
    return answer


def told(response: Any) -> list[Any]:
    return [response.status_code, response.json()]


def main() -> None:
    out: dict[str, Any] = {}
    client = l402_requests.L402Client(wallet=l402_requests.NwcWallet(NWC), budget=None, timeout=20)
    out["l402-requests"] = both(
        "l402-requests", lambda url, head, body: told(client.post(url, headers=head, json=body))
    )
    with pyl402.client.L402Client(ByWallet(), MemoryTokenStore(), timeout=20) as theirs:
        out["pyl402"] = both("pyl402", lambda url, head, body: told(theirs.post(url, headers=head, json=body)))
    client = bolthub.client.L402Client(BolthubWallet(pay))
    out["bolthub"] = both("bolthub", lambda url, head, body: told(client.post(url, headers=head, json=body)))
    out["l402sdk"] = [with_lnd()]
    print(json.dumps(out))


def with_lnd() -> list[Any]:
    """It cannot set headers: an account is its only way. Its node is a process of its own, because it keeps this one waiting."""
    node = subprocess.Popen([sys.executable, __file__, "lnd"], stdout=subprocess.PIPE, text=True)
    assert node.stdout is not None
    try:
        client = l402.L402Client.with_lnd_rest(f"http://127.0.0.1:{node.stdout.readline().strip()}", "00")
        answer = client.post(ACCOUNT, json.dumps(WISH))
        return [answer.status, answer.json()]
    finally:
        node.kill()
        node.wait()


def lnd() -> None:
    node = HTTPServer(("127.0.0.1", 0), Lnd)
    print(node.server_port, flush=True)
    node.serve_forever()


if sys.argv[1:] == ["lnd"]:
    lnd()
else:
    main()
