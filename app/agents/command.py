"""`satmeter mcp`: the MCP server over stdio, or as streamable HTTP on loopback."""

import argparse
import sys
from typing import Final

_MISSING: Final = (
    'error: this needs the extra `mcp`: pip install "satmeter[mcp]", or locked,'
    " python -m pip install --require-hashes -r deploy/requirements-mcp.txt"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-spend", action="store_true", help="also tools that commit money or rights")
    parser.add_argument("--http", type=int, metavar="PORT", help="streamable HTTP on this port of loopback, not stdio")
    parser.set_defaults(at_once=_serve)


def _serve(args: argparse.Namespace) -> int:
    from app.agents.wire import Account, Refused

    try:
        account = Account.of()
    except Refused as refused:
        return _failed(f"error: {refused}")
    try:
        from app.agents.server import make_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        return _failed(_MISSING)
    server = make_server(account, allow_spend=args.allow_spend)
    if args.http is None:
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=args.http)
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 2
