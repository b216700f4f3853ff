"""How HTTP asks in OpenRouter's words: the account and its calls, its keys, and the models."""

from app.openrouter.api.keys import OpenRouterKeysController
from app.openrouter.api.models import list_openrouter_models, read_openrouter_model
from app.openrouter.api.reads import list_daily_activity, read_current_key, read_generation, read_total_credits

handlers = (
    read_total_credits, read_current_key, list_daily_activity, read_generation, list_openrouter_models,
    read_openrouter_model, OpenRouterKeysController,
)  # fmt: skip
