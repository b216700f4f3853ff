"""An account in an agent's hands: an MCP server that knows the service by its wire alone. Needs the extra `mcp`."""
