"""The MCP server: what an agent may read of its account, and, where its keeper allows it, what commits money."""

from typing import Any, Final, Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from app.agents.wire import Account, Refused, segment

_INSTRUCTIONS: Final = (
    "A prepaid account for AI inference. Amounts are USD. Read the balance before dear work; explain a charge that surprises you."
    " Tools that commit money or rights are there only where the keeper of this server allowed them."
)
_READS: Final = ToolAnnotations(read_only_hint=True)
_COMMITS: Final = ToolAnnotations(read_only_hint=False, destructive_hint=False)


def make_server(account: Account, *, allow_spend: bool, version: str = "") -> MCPServer:
    """The tools over one account. Without `allow_spend` none of them changes anything."""
    server = MCPServer("satmeter", instructions=_INSTRUCTIONS, version=version, log_level="ERROR")
    _add_reads(server, account)
    if allow_spend:
        _add_spending(server, account)
    return server


def _add_reads(server: MCPServer, account: Account) -> None:
    @server.tool(annotations=_READS)
    async def balance() -> dict[str, Any]:
        """What is on the account, what calls in flight hold of it, what may be spent now, and how many days it lasts."""
        return await _told(account.get("/credits/balance"))

    @server.tool(annotations=_READS)
    async def activity(limit: int = 20, model: str | None = None) -> dict[str, Any]:
        """The last calls, newest first: model, units, cost. `id` of a row is what `explain_charge` takes."""
        return await _told(account.get("/queries/history", limit=limit, model=model))

    @server.tool(annotations=_READS)
    async def explain_charge(charge_id: str) -> dict[str, Any]:
        """The price lines that add up, to the nano-dollar, to what a call was charged."""
        return await _told(account.get(f"/activity/{segment(charge_id)}/explain"))

    @server.tool(annotations=_READS)
    async def topup_status(invoice_id: str) -> dict[str, Any]:
        """Whether a top-up was paid: wait for `status` to be Settled."""
        return await _told(account.get(f"/topup/status/{segment(invoice_id)}"))


def _add_spending(server: MCPServer, account: Account) -> None:
    @server.tool(annotations=_COMMITS)
    async def create_topup(
        amount: float, currency: Literal["USD", "SATS"] = "USD", method: str = "btc-lightning"
    ) -> dict[str, Any]:
        """An invoice to be paid: its `lightning_invoice` (or `address`), and `invoice_id` for `topup_status`."""
        return await _told(
            account.post(f"/topup/create/{segment(method)}", {"amount": _number(amount), "currency": currency})
        )

    @server.tool(annotations=_COMMITS)
    async def connect_wallet(
        nwc_url: str, threshold_usd: float = 10, topup_amount_usd: float = 10, max_per_day_usd: float | None = None
    ) -> dict[str, Any]:
        """Let a Lightning wallet (Nostr Wallet Connect) top the account up by itself below a threshold. The URL is a secret."""
        body = {
            "nwc_url": nwc_url, "threshold_usd": _number(threshold_usd), "topup_amount_usd": _number(topup_amount_usd),
        } | ({"max_per_day_usd": _number(max_per_day_usd)} if max_per_day_usd is not None else {})  # fmt: skip
        return await _told(account.post("/nwc-auto-topup/connect", body, as_owner=True))

    @server.tool(annotations=_COMMITS)
    async def create_child_key(
        name: str, usage_limit_usd: float, reset_period: Literal["daily", "weekly", "monthly"] | None = None
    ) -> dict[str, Any]:
        """An API key that may spend so much and no more, to hand to another agent or tool. `api_key` is shown once."""
        body = {"name": name, "usage_limit_usd": _number(usage_limit_usd)}
        return await _told(account.post("/keys", body | ({"reset_period": reset_period} if reset_period else {})))


def _number(value: float) -> str:
    """As plain decimal text: the service takes no exponent."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


async def _told(asking: Any) -> dict[str, Any]:
    """Raises ToolError with what the service says."""
    try:
        read: dict[str, Any] = await asking
    except Refused as refused:
        raise ToolError(str(refused)) from refused
    return read
