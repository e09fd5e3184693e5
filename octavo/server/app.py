"""The endpoints, on FastAPI. Bodies are read and parsed by hand (`body`): under bounds, and once.

FastAPI's own parsing would read a body of any size and report mistakes in its own shape. `build_app` gives the ASGI
application with all that stands in front of it.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from octavo.errors import OctavoError, nearest
from octavo.server.access import Caller
from octavo.server.body import Bodies
from octavo.server.chat import start_chat
from octavo.server.completions import start_completion
from octavo.server.exchange import Exchange
from octavo.server.failure import Failure, RefusedError
from octavo.server.front import Front
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.model import ServedModel
from octavo.server.off_loop import off_loop
from octavo.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    TokenizeRequest,
)
from octavo.server.schema import components, operations
from octavo.server.service import Service
from octavo.server.stream import Json, Reply, StreamedResponse, json_response, long_response, whole_response
from octavo.version import __version__

# Open without a key: what a load balancer, a monitor or a curious client asks.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics", "/version"})

Handler = Callable[[Request], Awaitable[Response]]
Parsed = Callable[[Request, type[Any]], Awaitable[Any]]

_MANY_TOKENS = 8192


def build_app(service: Service) -> ASGIApp:
    """The ASGI application: routes, then errors in OpenAI's shape, then the front door."""
    app = FastAPI(title="Octavo", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.bodies = {}  # kind of each path's body

    def openapi() -> Json:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document["paths"] = operations(document["paths"], app.state.bodies)
        document["components"] = {"schemas": components() | service.dialect.schemas()}
        if service.keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    bodies = Bodies(service.options.max_body_bytes)

    async def parsed(request: Request, kind: type[Any]) -> Any:
        service.ready_model()  # a draining server does not read bodies
        return await bodies.parsed(request, kind)

    _add_state(app, service)
    _add_model(app, service, parsed)
    _add_answers(app, service, parsed)

    async def tell(request: Request, error: Exception) -> Response:
        return _failed(service.dialect.failure(error))

    async def tell_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for it alone"
        return _no_route(app, service, request, error)

    app.add_exception_handler(OctavoError, tell)
    app.add_exception_handler(Exception, tell)
    app.add_exception_handler(HTTPException, tell_http)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    front = Front(app, service, OPEN_PATHS, frozenset(paths))
    origins = service.options.allowed_origins
    if not origins:
        return front
    # In front of the key: a browser asks whether it may ask, and sends no key with that.
    shown = ["x-request-id", "retry-after"]
    return CORSMiddleware(front, origins, allow_methods=["*"], allow_headers=["*"], expose_headers=shown)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/ping")
    @app.get("/health")
    async def health() -> Response:
        """Liveness: false when the engine is stuck. True while a model loads, as that ends."""
        trouble = service.trouble()
        return json_response(
            {"status": "ok"} if trouble is None else {"status": "unhealthy", "reason": trouble},
            200 if trouble is None else 503,
        )

    @app.get("/ready")
    async def ready() -> Response:
        """Readiness: whether new requests are taken."""
        reason = service.unready() or service.trouble()
        return json_response(
            {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason},
            200 if reason is None else 503,
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})


def _add_model(app: FastAPI, service: Service, parsed: Parsed) -> None:
    def card(model: ServedModel, name: str) -> Json:
        return service.dialect.card(model, name, service.limits.max_model_len)

    @app.get("/v1/models")
    async def models() -> Response:
        model = service.ready_model()
        return json_response({"object": "list", "data": [card(model, name) for name in model.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(card(service.model_named(name), name))

    @_post(app, "/tokenize", TokenizeRequest)
    async def tokenize(request: Request) -> Response:
        asked = await parsed(request, TokenizeRequest)
        model = service.model_named(asked.model)
        asked.check()
        if asked.messages is not None:
            variables, longest = asked.chat_template_kwargs or {}, service.limits.max_model_len
            tokens = await model.encode_chat(asked.messages, asked.add_generation_prompt, variables, longest)
        else:
            tokens = await model.encode(asked.prompt or "", asked.add_special_tokens is not False)
        answer = {"count": len(tokens), "max_model_len": service.limits.max_model_len, "tokens": tokens}
        return await long_response(lambda: answer) if len(tokens) > _MANY_TOKENS else json_response(answer)

    @_post(app, "/detokenize", DetokenizeRequest)
    async def detokenize(request: Request) -> Response:
        asked = await parsed(request, DetokenizeRequest)
        model = service.model_named(asked.model)
        asked.check()
        service.limits.check_ids("tokens", asked.tokens)
        many = len(asked.tokens) > _MANY_TOKENS
        decoded = (asked.tokens, asked.skip_special_tokens)
        return json_response({"prompt": await off_loop(model.decode, *decoded) if many else model.decode(*decoded)})


def _add_answers(app: FastAPI, service: Service, parsed: Parsed) -> None:
    @_post(app, "/v1/chat/completions", ChatRequest)
    async def chat_completions(request: Request) -> Response:
        asked = await parsed(request, ChatRequest)
        reply = await start_chat(service, asked, _caller(asked, request))
        return await _answered(service, reply, asked.stream, request)

    @_post(app, "/v1/completions", CompletionRequest)
    async def completions(request: Request) -> Response:
        asked = await parsed(request, CompletionRequest)
        reply = await start_completion(service, asked, _caller(asked, request))
        return await _answered(service, reply, asked.stream, request)


def _post(app: FastAPI, path: str, kind: type[BaseModel]) -> Callable[[Handler], Handler]:
    """Registers a POST endpoint whose body is a `kind`, which the endpoint parses itself.

    Twice: for FastAPI, so that /openapi.json knows it, and before that as a plain route, which is the one that is
    called: FastAPI's own way to an endpoint costs about a tenth of a millisecond (docs/decisions/0030).
    """
    app.state.bodies[path] = kind

    def register(handler: Handler) -> Handler:
        app.router.routes.insert(0, Route(path, handler, methods=["POST"]))
        return app.post(path, response_class=Response)(handler)

    return register


def _caller(asked: SamplingFields, request: Request) -> Caller:
    return Caller.of(request.scope["headers"], asked.user)


async def _answered(service: Service, reply: Reply, stream: bool | None, request: Request) -> Response:
    Exchange.of(request.scope).reply = reply
    if stream:
        return StreamedResponse(reply, service.dialect)
    return await whole_response(reply, service.dialect, request.receive)


def _failed(failure: Failure) -> Response:
    return Response(failure.body(), failure.status, failure.headers, media_type="application/json")


def _no_route(app: FastAPI, service: Service, request: Request, error: HTTPException) -> Response:
    path = request.scope["path"]
    if error.status_code == 405:
        message = f"{path[:100]} does not take {request.method}"
    else:
        known = [route.path for route in app.routes if hasattr(route, "path")]
        message = f"there is no {path[:100]} here.{nearest(path, known)}"
    code = "not_found" if error.status_code == 404 else None
    failure = service.dialect.failure(RefusedError(error.status_code, message, code=code))
    failure.headers.update(error.headers or {})
    return _failed(failure)
