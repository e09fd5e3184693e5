"""The front door, around the whole application.

Who may ask, request ids, the count and log of requests, and errors that nobody expected.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.log import logger
from octavo.server.access import Hosts
from octavo.server.exchange import Exchange
from octavo.server.failure import Failure
from octavo.server.service import Service

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Front:
    """ASGI middleware. `open_paths` need no key and are not logged; `known_paths` are the metrics' labels, and whatever
    else a client asks for counts as `other`."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        open_paths: frozenset[str],
        known_paths: frozenset[str],
    ):
        self._app = app
        self._service = service
        self._hosts = Hosts.of(service.options, service.keys)
        self._root_path = service.options.root_path
        self._open_paths = open_paths
        self._known_paths = known_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": self._without_prefix(scope["path"])}
        exchange = Exchange.begin(scope)
        # As ASGI has it, the path holds the prefix of a proxy, which the router takes off again.
        whole = self._root_path + scope["path"]
        scope |= {"path": whole, "raw_path": whole.encode(), "root_path": self._root_path}
        method, path = exchange.method, exchange.path
        if method == "HEAD":
            scope["method"] = "GET"

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", exchange.request_id.encode())]
                message = {**message, "headers": headers}
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        self._service.enter()
        try:
            self._hosts.check(scope["headers"])
            if path not in self._open_paths:
                self._service.keys.check(scope["headers"])
            await self._app(scope, receive, sent)
        except Exception as error:
            failure = self._service.dialect.failure(error)
            if failure.status >= 500:
                logger.exception("an unexpected error")
            if exchange.status == 0:
                await _send_failure(failure, sent)
        finally:
            self._service.leave()
            label = path if path in self._known_paths else "other"
            self._service.metrics.http(method if method in _METHODS else "other", label, exchange.status or 499)
            if self._service.options.log_requests and path not in self._open_paths:
                exchange.log()

    def _without_prefix(self, path: str) -> str:
        """Whether a proxy has taken its prefix off or not."""
        root = self._root_path
        return path[len(root) :] or "/" if root and (path == root or path.startswith(root + "/")) else path


async def _send_failure(failure: Failure, send: Send) -> None:
    body = failure.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **failure.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
