"""The upstreams file: who serves which model, under which name, and who stands in for whom."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

SHIPPED: Final = Path(__file__).with_name("upstreams.toml")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_SERVED_BY: Final = {
    "openai": (
        "chat", "completions", "responses", "embeddings", "speech", "transcriptions", "images", "edits", "videos",
    ),
    "anthropic": ("messages",),
}  # fmt: skip
"""What an upstream of a kind serves where its `serves` does not say otherwise. LiteLLM and vLLM serve `messages` too."""
ALL_SERVED: Final = tuple(dict.fromkeys(row for rows in _SERVED_BY.values() for row in rows))


class UpstreamsError(Exception):
    """The upstreams file cannot be used; the message says where it is wrong and what would help."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server of models. `models` are its names by ours; with `any_model` it takes every other name as it is."""

    name: str
    kind: str
    base_url: str
    key: str = field(repr=False)
    serves: frozenset[str]
    models: Mapping[str, str]
    any_model: bool = False
    is_stand_in: bool = False
    """It takes a model only if no other upstream has it, so that it is never a backup of a real one."""
    stands_for: frozenset[str] = frozenset()
    """Providers that a caller may name and means this one by, where they are no upstreams themselves."""
    provider: str | None = None
    """Whose prices its calls have, where the catalogue has several providers' for a model."""
    timeout_seconds: float = 300.0
    web_search: str | None = None
    """How its models search the web by themselves, if they do: `openai` (its search models), `anthropic`, or `perplexity`."""

    def name_of(self, model: str) -> str | None:
        """What the model is called there, None if it is not served."""
        return self.models.get(model) or (model if self.any_model else None)


@dataclass(frozen=True, slots=True)
class Target:
    """A model at an upstream. `model` is what Satmeter prices it as, `upstream_model` what the upstream calls it."""

    model: str
    upstream: Upstream
    upstream_model: str


@dataclass(frozen=True, slots=True)
class Search:
    """Where the web is searched for models that cannot: an API of Exa's form."""

    base_url: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Upstreams:
    """All of them, in the order of the file: the first that serves a model is its primary, the others its backups."""

    all: tuple[Upstream, ...]
    fallbacks: Mapping[str, tuple[str, ...]]
    search: Search | None = None

    def targets(self, model: str, row: str, provider: str | None = None) -> list[Target]:
        """Where a model can be had for this kind of call, the primary first.

        `provider/model` forces a provider as `provider` does. Empty if it is not served.
        """
        head, slash, rest = model.partition("/")
        if slash and provider in (None, head) and self._named(head):
            found = list(self._of(model, rest, row, head))
            if found:
                return found
        return list(self._of(model, model, row, provider))

    def serve(self, model: str) -> bool:
        """Whether a model can be had in any kind of call."""
        return any(self.targets(model, row) for row in ALL_SERVED)

    def name(self, model: str) -> bool:
        """Whether the file names a model, in whichever way it may be asked for."""
        bare = model.partition("/")[2]
        return any(model in each.models or bare in each.models for each in self.all)

    def providers_of(self, model: str) -> list[Upstream]:
        found = [target.upstream for row in ALL_SERVED for target in self.targets(model, row)]
        return [each for each in self.all if each in found]

    def _of(self, asked: str, model: str, row: str, provider: str | None) -> Iterator[Target]:
        named = self.all if provider is None else self._named(provider)
        having = [each for each in named if each.name_of(model) is not None]
        for each in [each for each in having if not each.is_stand_in] or having:
            name = each.name_of(model)
            if name is not None and row in each.serves:
                yield Target(asked, each, name)

    def _named(self, provider: str) -> tuple[Upstream, ...]:
        """The upstream of that name, or those that stand for it."""
        found = tuple(each for each in self.all if each.name == provider)
        return found or tuple(each for each in self.all if provider in each.stands_for)


# --- reading the file ------------------------------------------------------------------------------


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    upstream: list["_Upstream"]
    fallbacks: dict[str, list[str]] = {}
    search: "_Search | None" = None


class _Upstream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    kind: str
    base_url: str
    key_env: str = ""
    optional: bool = False
    """Left out, and not an error, where the variable of its key is not set."""
    serves: list[str] | None = None
    models: dict[str, str] | list[str] = []
    any_model: bool = False
    stand_in: bool = False
    stands_for: list[str] = []
    provider: str | None = None
    timeout_seconds: float = 300.0
    web_search: str | None = None


class _Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base_url: str
    key_env: str
    optional: bool = False


def read_upstreams(path: Path, environ: Mapping[str, str]) -> Upstreams:
    """Raises UpstreamsError, one line."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UpstreamsError(f"GATEWAY_UPSTREAMS: {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UpstreamsError(f"{path} is no TOML: {error}") from error
    try:
        read = msgspec.convert(data, _File)
    except msgspec.ValidationError as error:
        raise UpstreamsError(f"{path}: {error}") from error
    try:
        found = [made for each in read.upstream if (made := _made(each, environ)) is not None]
        upstreams = Upstreams(tuple(found), {model: tuple(names) for model, names in read.fallbacks.items()},
                              _search(read.search, environ))  # fmt: skip
        _check(upstreams)
    except ValueError as error:
        raise UpstreamsError(f"{path}: {error}") from error
    return upstreams


def _made(each: _Upstream, environ: Mapping[str, str]) -> Upstream | None:
    """Raises ValueError."""
    where = f"upstream {each.name[:80]!r}"
    if not _NAME.fullmatch(each.name):
        raise ValueError(f"{where}: a name is 1-64 lower-case letters, digits, dots, dashes or underscores")
    if each.kind not in _SERVED_BY:
        raise ValueError(f"{where}: kind {each.kind!r} is not one of {', '.join(_SERVED_BY)}")
    serves = each.serves if each.serves is not None else _SERVED_BY[each.kind]
    unknown = sorted(set(serves) - set(ALL_SERVED))
    if unknown:
        raise ValueError(f"{where}: serves {unknown[0]!r}, which is not one of {', '.join(ALL_SERVED)}")
    if each.web_search not in (None, "openai", "anthropic", "perplexity"):
        raise ValueError(f"{where}: web_search {each.web_search!r} is not one of openai, anthropic, perplexity")
    if not 0 < each.timeout_seconds <= 86_400:
        raise ValueError(f"{where}: timeout_seconds is more than 0 and at most 86400")
    models = each.models if isinstance(each.models, dict) else {name: name for name in each.models}
    if not models and not each.any_model:
        raise ValueError(f"{where}: names no models; give models, or any_model = true")
    key = _key(each.key_env, environ, where, each.optional)
    if key is None:
        return None
    return Upstream(
        each.name, each.kind, _base_url(each.base_url, environ, where), key, frozenset(serves), models, each.any_model,
        each.stand_in, frozenset(each.stands_for), each.provider, each.timeout_seconds, each.web_search,
    )  # fmt: skip


def _search(each: _Search | None, environ: Mapping[str, str]) -> Search | None:
    if each is None:
        return None
    key = _key(each.key_env, environ, "search", each.optional)
    return None if key is None else Search(_base_url(each.base_url, environ, "search"), key)


def _key(variable: str, environ: Mapping[str, str], where: str, optional: bool) -> str | None:
    """What the variable holds; "" where no key is needed, None where the upstream is left out. Raises ValueError."""
    key = environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        if optional:
            return None
        raise ValueError(f"{where}: its key is in {variable}, which is not set; set it, or say optional = true")
    if any(not 32 < ord(char) < 127 for char in key):
        raise ValueError(f"{where}: the key in {variable} is not one line of visible ASCII")
    return key


def _base_url(text: str, environ: Mapping[str, str], where: str) -> str:
    """With `${VARIABLE}` put in. Raises ValueError."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in environ:
            raise ValueError(f"{where}: base_url names {found[0]}, which is not set")
        return environ[found[1]]

    url = re.sub(r"\$\{(\w+)\}", value, text)
    if not re.fullmatch(r"https?://[^\s/?#@]+(?:/[^\s?#]*)?", url):
        raise ValueError(f"{where}: base_url must be an http(s) URL without credentials or query")
    return url.rstrip("/")


def _check(upstreams: Upstreams) -> None:
    """Raises ValueError."""
    names = [each.name for each in upstreams.all]
    if not names:
        raise ValueError("there is no upstream that can be used; set the variable of one's key")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two upstreams are named {name!r}")
    for model, others in upstreams.fallbacks.items():
        for other in others:
            if not upstreams.serve(other):
                raise ValueError(f"fallbacks of {model!r}: {other!r} is served by no upstream")
