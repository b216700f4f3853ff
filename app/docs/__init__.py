"""What the service tells about itself: `/openapi.json`, `/docs` and `/llms.txt`.

words ── schema ── contract ── page ── the doors, here
"""

from typing import Any

from litestar import Request, Response, Router, get
from litestar.datastructures import ResponseHeader
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, Info, OpenAPI, Server

from app import __version__
from app.docs.contract import Document, Routes
from app.docs.page import POLICY, guide, reference_page
from app.docs.words import ABOUT, WHAT, Json


class Contract(OpenAPIConfig):
    """The OpenAPI settings of this house; `structs` goes among the plugins, the document is `app.openapi_schema`."""

    def __init__(self, public_url: str) -> None:
        self.structs = Routes()
        guarded = [ResponseHeader(name="Content-Security-Policy", value=POLICY)]
        super().__init__(
            title="Satmeter",
            version=__version__,
            servers=[Server(url=public_url)],
            use_handler_docstrings=True,
            operation_id_creator=self.structs.name,
            openapi_router=Router("/docs", route_handlers=[], response_headers=guarded, include_in_schema=False),
            render_plugins=[Page()],
        )

    def to_openapi_schema(self) -> OpenAPI:
        info = Info(title=self.title, version=self.version, summary=WHAT, description=ABOUT)
        document = Document(info=info, servers=self.servers, components=Components(), paths={})
        document.routes = self.structs
        return document


class Page(OpenAPIRenderPlugin):
    """`/docs`: the document as one page."""

    def __init__(self) -> None:
        super().__init__(path="/")
        self._page = b""

    def render(self, request: Request[Any, Any, Any], openapi_schema: Json) -> bytes:
        self._page = self._page or reference_page(openapi_schema).encode()
        return self._page


@get("/openapi.json", include_in_schema=False, sync_to_thread=False)
def openapi_json(request: Request[Any, Any, Any]) -> Json:
    """The contract."""
    return request.app.openapi_schema.to_schema()


@get("/llms.txt", include_in_schema=False, sync_to_thread=False)
def llms(request: Request[Any, Any, Any]) -> Response[str]:
    """The contract, for AI agents."""
    return Response(guide(request.app.openapi_schema.to_schema()), media_type="text/plain")


handlers = (openapi_json, llms)
