"""What clients made for OpenRouter ask, in its words: below /api/v1."""
