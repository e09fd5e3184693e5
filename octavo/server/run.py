"""`octavo serve`: the HTTP process from its first line to its exit code.

The port is taken first, because it is cheap to find it taken; the engine's process starts before the web framework is
imported, because its start is the longest.
"""

import asyncio
import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from octavo.checkpoint import open_checkpoint
from octavo.config import EngineOptions, ServerOptions, expanded
from octavo.engine.process import EngineClient
from octavo.errors import ConfigError
from octavo.log import logger
from octavo.models import check_runnable
from octavo.server.access import Keys
from octavo.server.dialect import Dialect
from octavo.server.metrics import Metrics
from octavo.server.model import ServedModel, load_model
from octavo.server.service import Service
from octavo.server.supervisor import Supervisor
from octavo.timeline import Timeline, describe, process_age

KEEP_ALIVE_SECONDS = 60  # longer than most clients' own limit: who closes last avoids the race
_BACKLOG = 2048
_UNIX: int | None = getattr(socket, "AF_UNIX", None)
CLOSING_SECONDS = 2  # for sending what is written, once the engine has ended


def run_server(
    options: EngineOptions,
    server_options: ServerOptions,
    *,
    verbose: bool = False,
    load: Callable[[], ServedModel] | None = None,
    dialect: Dialect | None = None,
) -> int:
    """Serves until a signal; returns the exit code. Raises an `OctavoError` if the server cannot start or go on.

    `load` makes what the front knows of the model; by default that is what the model's own files say.
    `dialect` is how the server speaks where servers differ; by default as OpenAI's.
    """
    timeline = [("python", process_age())]
    began = time.monotonic()
    with listen(server_options) as listener:
        # What is wrong with these must show before a model is fetched for them.
        _tls_context(server_options)
        keys = Keys.of(server_options)
        # Fetches a model that is not here yet, before two processes look for it.
        open_checkpoint(options.model, hub=options.hub, revision=options.revision, weights=False, check=check_runnable)
        timeline.append(("files", time.monotonic() - began))

        async def serve_model() -> int:
            engine = EngineClient(
                options,
                max_queued_requests=server_options.max_queued_requests,
                confirm_timeout=server_options.confirm_timeout,
                verbose=verbose,
                log_format=server_options.log_format,
            )
            reader = load or (lambda: load_model(options, server_options))
            service = Service(
                engine, server_options, Metrics(lambda: engine.stats), dialect=dialect or Dialect(), keys=keys
            )
            return await serve(service, reader, listener, timeline)

        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(serve_model())


async def serve(
    service: Service,
    load: Callable[[], ServedModel],
    listener: socket.socket,
    timeline: Timeline,
) -> int:
    """Serves `service` on `listener` until a signal or the engine's end; `timeline` holds the phases so far."""
    began = time.monotonic()
    tls = _tls_context(service.options)
    supervisor = Supervisor(service, load)
    supervisor.timeline += timeline
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, supervisor.signalled)
    loading = asyncio.ensure_future(supervisor.load())
    await asyncio.sleep(0)  # the engine's process is on its way now
    http = HttpServer(service, tls)
    supervisor.timeline.append(("http", time.monotonic() - began))
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(supervisor.stopped.wait())
    try:
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            _announce(service, supervisor.timeline, listener)
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loading.cancel()
        stopping.cancel()
        await supervisor.close()
        http.stop.set()
        await serving
    if supervisor.error is not None:
        raise supervisor.error
    return 0


class HttpServer(uvicorn.Server):
    """uvicorn, but for its signal handlers, which are the supervisor's, and its clock, which ticks ten times a second
    to write a Date header: an idle server sleeps."""

    def __init__(self, service: Service, tls: ssl.SSLContext | None = None):
        from octavo.server.app import build_app
        from octavo.server.connection import Connection

        config = uvicorn.Config(
            build_app(service),
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            date_header=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        config.load()
        config.ssl = tls
        super().__init__(config)
        self.stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets, "listened before"
        if sockets[0].family != _UNIX:
            await super().startup(sockets)
            return

        def connection() -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        loop = asyncio.get_running_loop()
        self.servers = [await loop.create_unix_server(connection, sock=sockets[0], ssl=self.config.ssl)]
        self.started = True

    async def main_loop(self) -> None:
        await self.stop.wait()


@contextlib.contextmanager
def listen(options: ServerOptions) -> Iterator[socket.socket]:
    """A listening socket; raises `ConfigError` that says what to do. Port 0 is any free one."""
    if options.uds is not None:
        with _listen_unix(expanded(options.uds)) as listener:
            yield listener
        return
    host, port = options.host, options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise ConfigError(f"host {host} and port {port} are no address to listen on: {error}") from None
    with socket.socket(family, kind, protocol) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            raise ConfigError(_cannot_listen(host, port, error)) from None
        listener.setblocking(False)
        yield listener


@contextlib.contextmanager
def _listen_unix(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket, whose file is there as long as it listens. One that a dead server left is replaced."""
    if _UNIX is None:
        raise ConfigError(f"uds is {path}, and this system has no Unix sockets; use --host and --port")
    with socket.socket(_UNIX, socket.SOCK_STREAM) as listener:
        try:
            if path.is_socket() and _is_left_over(path):
                path.unlink()
            listener.bind(str(path))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = "it is there already, and no socket that was left" if in_use else error.strerror or str(error)
            if in_use and path.is_socket():
                why = "another program listens on it"
            raise ConfigError(f"cannot listen on the Unix socket {path}: {why}; choose another with --uds") from None
        ours = path.stat()
        try:
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(path.stat(), ours):  # another server may have taken the place
                    path.unlink()


def _is_left_over(path: Path) -> bool:
    """Whether nobody listens on the socket any more."""
    assert _UNIX is not None, "asked before"
    with socket.socket(_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        return client.connect_ex(str(path)) == errno.ECONNREFUSED


def _tls_context(options: ServerOptions) -> ssl.SSLContext | None:
    """What makes connections TLS ones; raises `ConfigError` for files that cannot be used."""
    if options.ssl_certfile is None or options.ssl_keyfile is None:
        return None

    def no_password() -> str:
        raise ConfigError(
            f"ssl_keyfile {options.ssl_keyfile} is encrypted; decrypt it, as with: openssl pkey -in FILE -out NEW_FILE"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = expanded(getattr(options, name))
        if not path.is_file() or not os.access(path, os.R_OK):
            raise ConfigError(f"{name} {path} is no file that can be read")
    try:
        context.load_cert_chain(expanded(options.ssl_certfile), expanded(options.ssl_keyfile), no_password)
    except ConfigError:
        raise
    except (ssl.SSLError, OSError, ValueError) as error:
        why = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"ssl_certfile {options.ssl_certfile} and ssl_keyfile {options.ssl_keyfile} are no certificate in PEM"
            f" and its key ({why})"
        ) from None
    return context


def _cannot_listen(host: str, port: int, error: Exception) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return f"port {port} is in use by another program; stop it, or choose another port with --port"
    if code == errno.EACCES:
        return f"port {port} needs more rights than this user has; choose one above 1023 with --port"
    if code == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine; choose another with --host (0.0.0.0 for all)"
    return f"cannot listen on {host} port {port}: {error}"


def _announce(service: Service, timeline: Timeline, listener: socket.socket) -> None:
    """The lines that a person waits for: what took how long, and what to try."""
    logger.info("ready after %.2f s: %s", process_age(), describe(timeline))
    model = service.ready_model()
    url = url_of(listener, service.options)
    print(f"{model.name} is served at {url}\nTry it:\n  {curl_line(model, url, service)}", flush=True)


def url_of(listener: socket.socket, options: ServerOptions) -> str:
    """Where a client on this machine reaches `listener`."""
    if options.uds is not None:
        return f"unix:{expanded(options.uds)}"
    scheme = "http" if options.ssl_certfile is None else "https"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def curl_line(model: ServedModel, url: str, service: Service) -> str:
    """A command that asks the model something."""
    question = "What is the capital of France?"
    path = "chat/completions" if model.is_chat else "completions"
    asked: dict[str, object] = {"model": model.name, "temperature": 0}
    asked |= {"messages": [{"role": "user", "content": question}]} if model.is_chat else {"prompt": question}
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    key = " -H 'Authorization: Bearer YOUR_API_KEY'" if service.keys else ""
    if url.startswith("unix:"):
        scheme = "http" if service.options.ssl_certfile is None else "https"
        url = f"--unix-socket {shlex.quote(url.removeprefix('unix:'))} {scheme}://localhost"
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {body}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed; it is about a third faster."""
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
