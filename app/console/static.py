"""The pages' files: read once, compressed once, served under a name that has their hash in it, and so for ever."""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from app.console.colours import theme_text
from app.kernel.errors import NotFound
from app.kernel.settings import Settings

FOLDER: Final = Path(__file__).parent / "static"
PREFIX: Final = "/console/static"
_TYPES: Final = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_FOR_EVER: Final = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it goes out; `name` has the hash of its bytes."""

    name: str
    media_type: str
    body: bytes
    squeezed: bytes

    @classmethod
    def of(cls, name: str, body: bytes) -> "Asset":
        body = body.removesuffix(b"\n") + b"\n"  # as every text goes out, so that the hash is of what is served
        stem, _, suffix = name.rpartition(".")
        digest = hashlib.sha256(body).hexdigest()[:16]
        return cls(f"{stem}.{digest}.{suffix}", _TYPES[f".{suffix}"], body, gzip.compress(body, 9, mtime=0))


@cache
def assets() -> Mapping[str, Asset]:
    """Every file by the plain name that pages call it by, such as `console.css` and `htmx.js`."""
    return MappingProxyType(
        {
            path.name: Asset.of(path.name, path.read_bytes())
            for path in sorted(FOLDER.rglob("*"))
            if path.suffix in _TYPES
        }
    )


@cache
def theme(colour: str) -> Asset:
    """The operator's colour as a stylesheet: a page may have no style of its own."""
    return Asset.of("theme.css", theme_text(colour).encode())


def url(name: str) -> str:
    """Where a file is. Raises KeyError for one that we do not have."""
    return f"{PREFIX}/{assets()[name].name}"


def theme_url(settings: Settings) -> str:
    return f"{PREFIX}/{theme(settings.service_colour).name}"


@get(f"{PREFIX}/{{name:str}}", include_in_schema=False, sync_to_thread=False)
def static_file(
    request: Request[Any, Any, Any], settings: NamedDependency[Settings], name: FromPath[str]
) -> Response[bytes]:
    """What does not change under this name; another content has another name. Raises NotFound."""
    known = (*assets().values(), theme(settings.service_colour))
    asset = next((one for one in known if one.name == name), None)
    if asset is None:
        raise NotFound
    headers = {"Cache-Control": _FOR_EVER, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(asset.squeezed, media_type=asset.media_type, headers=headers | {"Content-Encoding": "gzip"})
    return Response(asset.body, media_type=asset.media_type, headers=headers)
