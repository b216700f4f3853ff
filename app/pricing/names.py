"""Which model a name means: as it is sold here, by the names that its price file knows, dated, or with a provider before it.

A call names a model as its proxy does (`openai/gpt-4o`), as a provider's answer does (`gpt-4o-2024-11-20`), or as a cloud
does (`us.anthropic.claude-sonnet-4-5-20250929-v1:0`). What is nearest decides: the name itself, then the file's own match
names, then the same model without what is around its name. A snapshot of another day is never taken for it.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_REMEMBERED: Final = 4096
_FAMILIES: Final = (
    ("openai", "text-completion-openai", "chatgpt"),
    ("anthropic", "claude"),
    ("aws", "bedrock", "bedrock_converse", "bedrock_mantle", "amazon", "amazon-bedrock", "amazon_nova", "sagemaker"),
    ("google", "gemini", "vertex", "google-vertex", "google-ai-studio", "google_ai_studio", "palm"),
    ("azure", "azure_ai", "azure_text", "azure-openai", "azure_openai", "microsoft"),
    ("x-ai", "xai", "grok"),
    ("mistral", "mistralai", "codestral", "text-completion-codestral"),
    ("together", "together_ai", "togetherai", "together-ai"),
    ("fireworks", "fireworks_ai", "fireworks-ai", "fireworks_ai-embedding-models"),
    ("cohere", "cohere_chat"),
    ("deepseek", "deepseek-ai"),
    ("perplexity", "perplexity-ai"),
    ("moonshotai", "moonshot"),
    ("alibaba", "dashscope", "qwen"),
    ("huggingface", "hf", "huggingface_pro"),
    ("novita", "novita-ai", "novita_ai"),
    ("ovhcloud", "ovh"),
    ("black-forest-labs", "black_forest_labs", "bfl"),
)
"""One seller under the names that price files, gateways and its own answers give it."""
_FAMILY_OF: Final = {name: family[0] for family in _FAMILIES for name in family}
_DATE: Final = re.compile(
    r"[-@](?:20\d\d-[01]\d-[0-3]\d|20\d\d[01]\d[0-3]\d|[01]\d-[0-3]\d|[01]\d[0-3]\d|latest|default|\d{3})$", re.ASCII
)
_CLOUD: Final = re.compile(
    r"(?:(?:us|eu|apac|ap|au|jp|ca|in|sa|global|us-gov)\.)?"
    r"(?:anthropic|amazon|meta|mistral|cohere|ai21|deepseek|openai|qwen|google|xai|moonshotai|minimax|nvidia|writer)\."
    r"(?P<name>[^:]+?)(?:-v\d+)?(?:-?\d*:\d+)?",
    re.ASCII,
)
"""`us.anthropic.claude-sonnet-4-5-20250929-v1:0`: a region, whose model it is, its name, and the cloud's own version of it."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model as it is sold here. `is_assumed`: not by the provider that was named."""

    model: str
    provider: str
    is_assumed: bool = False


class Names:
    """The names of one catalogue. What was found is remembered, for the names that calls come with are few."""

    __slots__ = ("_bare", "_clauses", "_providers", "_remembered", "_small")

    def __init__(
        self, providers: Mapping[str, Sequence[str]], matches: Mapping[tuple[str, str], str] | None = None
    ) -> None:
        self._providers = providers
        self._small: dict[str, list[str]] = defaultdict(list)
        self._bare: dict[str, list[str]] = defaultdict(list)
        for model in sorted(providers):
            self._small[model.lower()].append(model)
            for bare in dict.fromkeys(_bared(model.lower())):
                self._bare[bare].append(model)
        self._clauses = [(key, json.loads(match)) for key, match in (matches or {}).items()]
        self._remembered: dict[tuple[str, str], Found | None] = {}

    def found(self, model: str, provider: str) -> Found | None:
        """Who sells it: the named provider, else the one that its name begins with, else the dearest. None if nobody."""
        key = (model, provider)
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._searched(model, provider.lower())
        return self._remembered[key]

    def _searched(self, model: str, provider: str) -> Found | None:
        seller = provider or self._seller_in(model)
        for is_assumed in (False, True) if seller else (True,):
            for name, sold_by in self._candidates(model, "" if is_assumed else seller):
                if is_assumed or _is_same(sold_by, seller):
                    return Found(name, sold_by, is_assumed and bool(seller))
        return None

    def _seller_in(self, model: str) -> str:
        """The provider that a name begins with, if it sells that here: `openai/gpt-4o`."""
        head, slash, _ = model.lower().partition("/")
        known = (
            {each for sellers in self._providers.values() for each in sellers}
            if slash and not self._providers.get(model)
            else ()
        )
        return head if any(_is_same(each, head) for each in known) else ""

    def _candidates(self, model: str, provider: str) -> Iterator[tuple[str, str]]:
        """Models and who sells them, the nearest name first and of one name the dearest provider first."""
        names = _unprefixed(model)
        prefixed = [f"{provider}/{model}"] if provider else []
        for name in (*names[:1], *prefixed, *names[1:]):
            yield from self._sold((name,))
        for name in names:
            yield from self._sold(self._small.get(name.lower(), ()))
        yield from self._matching([name.lower() for name in names])
        for name in names:
            for bare in _bared(name.lower()):
                yield from self._sold(self._snapshots(name.lower(), bare))

    def _sold(self, models: Iterable[str]) -> Iterator[tuple[str, str]]:
        for model in models:
            for provider in self._providers.get(model, ()):
                yield model, provider

    def _matching(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """By the price file's own match names, in the file's order."""
        for name in names:
            for key, clause in self._clauses:
                if key[1] in self._providers.get(key[0], ()) and _matches(clause, name):
                    yield key

    def _snapshots(self, name: str, bare: str) -> list[str]:
        """Models of the same bare name, but for those of another day than a dated one's; what has no date comes first."""
        dated = _date_of(name)
        same = [model for model in self._bare.get(bare, ()) if _date_of(model.lower()) in ("", dated) or not dated]
        return sorted(same, key=lambda model: (_date_of(model.lower()) != dated, bool(_date_of(model.lower()))))


def _is_same(provider: str, named: str) -> bool:
    return family_of(provider) == family_of(named)


def family_of(provider: str) -> str:
    """A provider's name without what tells its products apart: `vertex_ai-anthropic_models` is Google's."""
    provider = provider.lower()
    if provider.startswith("vertex_ai"):
        return "google"
    return _FAMILY_OF.get(provider, provider)


def _unprefixed(model: str) -> list[str]:
    """`a/b/c`, `b/c`, `c`."""
    parts = model.split("/")
    return ["/".join(parts[place:]) for place in range(len(parts)) if parts[place]] or [model]


def _bared(name: str) -> Iterator[str]:
    """The name without its provider, cloud, version and date: the least taken away first."""
    last = name.rsplit("/", 1)[-1]
    yield last
    cloud = _CLOUD.fullmatch(last)
    bare = cloud["name"] if cloud is not None else last
    yield bare
    yield _DATE.sub("", bare)


def _date_of(name: str) -> str:
    """The day of a snapshot as digits, '' of a name without."""
    cloud = _CLOUD.fullmatch(name.rsplit("/", 1)[-1])
    found = _DATE.search(cloud["name"] if cloud is not None else name)
    return re.sub(r"\D", "", found.group()) if found is not None else ""


def _matches(clause: Any, name: str) -> bool:
    """genai-prices' match logic; what is no clause of it matches nothing."""
    ((kind, wanted),) = clause.items()
    match kind:
        case "or":
            return any(_matches(each, name) for each in wanted)
        case "and":
            return all(_matches(each, name) for each in wanted)
        case "regex":
            return re.search(wanted, name) is not None
        case "equals":
            return name == str(wanted).lower()
        case "starts_with":
            return name.startswith(str(wanted).lower())
        case "ends_with":
            return name.endswith(str(wanted).lower())
        case "contains":
            return str(wanted).lower() in name
    return False
