"""Who may ask and how: keys, hosts, content types, request ids, HEAD, a proxy's path, TLS, Unix sockets, the log."""

import asyncio
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
import trustme

from octavo.config import ServerOptions
from octavo.errors import ConfigError
from octavo.server.access import Caller, Hosts, Keys
from octavo.server.failure import RefusedError
from octavo.server.run import listen
from tests.server.serving import Server, run, serving
from tests.server.test_errors import error_of
from tests.server.test_lifetime import ask, server


def with_options(**options):
    """As `run`, for a server with these options."""

    def decorated(test):
        def wrapped():
            async def whole():
                async with asyncio.timeout(20), serving(options=ServerOptions(**options)) as server:
                    await test(server)

            asyncio.run(whole())

        wrapped.__name__ = test.__name__
        return wrapped

    return decorated


# ---- keys ---------------------------------------------------------------------------------------------------------


def test_keys_come_from_options_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "keys").write_text("third\n\n  sésame \n", "utf-8-sig")
    monkeypatch.setenv("OCTAVO_API_KEY", "first, second")
    keys = Keys.of(ServerOptions(api_key=["zeroth"], api_key_file=str(tmp_path / "keys")))
    for key in ("zeroth", "first", "second", "third", "sésame"):
        keys.check([(b"authorization", f"Bearer {key}".encode())])
    for wrong in (b"Bearer first,second", b"Bearer ", b"first", b"", b"Basic first", b"Bearer \xff"):
        with pytest.raises(RefusedError, match="a valid API key"):
            keys.check([(b"authorization", wrong)])


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        ({"api_key": ""}, None, "a key of api_key is empty"),
        ({"api_key": [" a"]}, None, "blanks or characters that no header can carry"),
        ({"api_key": ["\udcff"]}, None, "a key of api_key .* no header can carry"),
        ({}, "a\x01", "a key of OCTAVO_API_KEY"),
        ({}, " , ", "OCTAVO_API_KEY holds no key"),
        ({"api_key_file": "/nowhere/keys"}, None, "api_key_file /nowhere/keys cannot be read: No such file"),
        ({"isolate_prefix_cache": True}, None, "isolate_prefix_cache tells clients apart by their API keys"),
    ],
)
def test_keys_that_cannot_be_used(options, variable, message, monkeypatch: pytest.MonkeyPatch):
    if variable is not None:
        monkeypatch.setenv("OCTAVO_API_KEY", variable)

    async def start():
        async with serving(options=ServerOptions(**options)):
            pass

    with pytest.raises(ConfigError, match=message):
        asyncio.run(start())


@with_options(api_key=["one", "two"], isolate_prefix_cache=True)
async def test_prefixes_are_apart_by_key(server: Server):
    salts = []
    submit = server.engine.submit
    server.engine.submit = lambda request, **more: salts.append(request.cache_salt) or submit(request, **more)
    for key, salt in (("one", None), ("one", None), ("two", None), ("one", "x"), ("two", "x")):
        fields = {} if salt is None else {"cache_salt": salt}
        answer = await server.chat(headers={"Authorization": f"Bearer {key}"}, **fields)
        assert answer.status_code == 200
    assert salts[0] == salts[1]
    assert len({*salts}) == 4
    assert not any("one" in salt or "two" in salt for salt in salts)


# ---- what a web page can and cannot send -----------------------------------------------------------------------------


LOCAL = [
    "localhost",
    "localhost:8000",
    "127.0.0.1:8000",
    "[::1]:80",
    "[::1]",
    "api.localhost",
    "host.docker.internal:1",
]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "xinternal", "[::1"]


def refused(hosts: Hosts, name: str) -> bool:
    try:
        hosts.check([(b"host", name.encode())])
    except RefusedError:
        return True
    return False


def test_a_server_of_this_machine_answers_by_its_names():
    hosts = Hosts.of(ServerOptions(), Keys())
    assert [name for name in (*LOCAL, "", "LOCALHOST.", "192.168.1.7:80") if refused(hosts, name)] == []
    assert [name for name in FOREIGN if not refused(hosts, name)] == []


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"allowed_hosts": ["*"]}, {"uds": "/x"}, {"host": "::"}])
def test_other_servers_answer_by_any_name(options):
    hosts = Hosts.of(ServerOptions(**options), Keys())
    assert not any(refused(hosts, name) for name in (*LOCAL, *FOREIGN))
    assert not any(refused(Hosts.of(ServerOptions(), Keys(["key"])), name) for name in FOREIGN)


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "LOCALHOST", "::1", "::ffff:127.0.0.1"])
def test_this_machine_by_another_spelling(host: str):
    hosts = Hosts.of(ServerOptions(host=host), Keys())
    assert refused(hosts, "evil.example")
    assert not refused(hosts, "localhost:80")


def test_a_name_that_is_not_among_the_allowed_says_so():
    hosts = Hosts.of(ServerOptions(allowed_hosts=["llm.example"]), Keys(["key"]))
    with pytest.raises(RefusedError, match="by the names of --allowed-hosts and of its own machine alone; add this"):
        hosts.check([(b"host", b"evil.example")])


def test_a_key_is_one_tenant_however_it_is_written():
    def tenant(header: bytes, user: str | None = None) -> str:
        return Caller.of([(b"authorization", header)], user).tenant

    assert len({tenant(b"Bearer" + b" " * count + b"K") for count in (1, 2, 5)} | {tenant(b"bearer K ")}) == 1
    assert tenant(b"Bearer K", "a") != tenant(b"Bearer L", "a") != tenant(b"", "a")
    assert tenant(b"Bearer K", "a") != tenant(b"Bearer K", "b")


def test_names_that_are_allowed():
    for options in ({}, {"host": "0.0.0.0"}):
        hosts = Hosts.of(ServerOptions(allowed_hosts=["llm.example"], **options), Keys(["key"]))
        assert not refused(hosts, "LLM.example:443")
        assert not refused(hosts, "localhost")
        assert refused(hosts, "evil.example")


@run
async def test_a_web_page_cannot_drive_the_server(server: Server):
    answer = await server.get("/v1/models", headers={"Host": "evil.example"})
    assert error_of(answer, 403)["code"] == "host_not_allowed"
    body = json.dumps(ask("hello")).encode()
    # What a page may send to another origin without asking: these types, or a body without one.
    kinds = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", None, "json"]
    for kind in kinds:
        headers = {} if kind is None else {"Content-Type": kind}
        answer = await server.client.post("/v1/chat/completions", content=body, headers=headers)
        assert "Content-Type: application/json" in error_of(answer, 415)["message"], kind
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        answer = await server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 200
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = await server.client.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


@run
async def test_bodies_are_sent_as_they_are(server: Server):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = await server.client.post("/v1/chat/completions", content=b"\x1f\x8b", headers=headers)
    assert "content encoding is 'gzip'" in error_of(answer, 415)["message"]
    headers["Content-Encoding"] = "identity"
    answer = await server.client.post("/v1/chat/completions", content=json.dumps(ask("hi")), headers=headers)
    assert answer.status_code == 200


# ---- names, ids, methods, paths --------------------------------------------------------------------------------------


@run
async def test_a_model_of_several_names(server: Server):
    server.service.model.aliases = ["gpt-4o", "org/model"]
    listed = (await server.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["tiny", "gpt-4o", "org/model"]
    for name in ("tiny", "gpt-4o", "org/model"):
        assert (await server.get(f"/v1/models/{name}")).json()["id"] == name
        answer = await server.chat(model=name)
        assert answer.json()["model"] == "tiny"
    error = error_of(await server.chat(model="gpt-4"), 404)
    assert error["message"].startswith(
        "the model 'gpt-4' is not served here, but 'tiny' and 'gpt-4o' and 'org/model' are"
    )
    assert error["message"].endswith("Did you mean 'gpt-4o'?")


@run
async def test_request_ids(server: Server):
    for path in ("/v1/models", "/nowhere", "/health"):
        given = (await server.get(path, headers={"X-Request-Id": "trace-1:a/b=c@d"})).headers["x-request-id"]
        assert given == "trace-1:a/b=c@d"
    streamed = await server.chat(stream=True, headers={"X-Request-Id": "mine"})
    assert streamed.headers["x-request-id"] == "mine"
    for odd in ("", "two words", "x" * 129, "a\tb", "é".encode()):
        made = (await server.get("/v1/models", headers={"X-Request-Id": odd})).headers["x-request-id"]
        assert made != odd
        assert len(made) == 32
    answers = [(await server.chat()).headers["x-request-id"] for _ in range(2)]
    assert len({*answers}) == 2


@run
async def test_head_is_get_without_a_body(server: Server):
    for path in ("/health", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nowhere"):
        whole, head = await server.get(path), await server.client.head(path)
        assert head.status_code == whole.status_code
        assert head.content == b""
        assert head.headers["content-type"] == whole.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == whole.headers["content-length"]
    assert (await server.client.head("/v1/completions")).status_code == 405


@with_options(root_path="/llm", api_key="secret")
async def test_a_path_of_a_proxy(server: Server):
    """A proxy may take the prefix off or leave it on."""
    key = {"Authorization": "Bearer secret"}
    for prefix in ("", "/llm"):
        assert (await server.get(f"{prefix}/health")).status_code == 200
        assert (await server.get(f"{prefix}/v1/models")).status_code == 401
        assert (await server.get(f"{prefix}/v1/models/tiny", headers=key)).json()["id"] == "tiny"
        answer = await server.post(f"{prefix}/v1/chat/completions", ask("hi"), headers=key)
        assert answer.json()["choices"]
    assert (await server.get("/llm2/v1/models", headers=key)).status_code == 404
    assert (await server.get("/openapi.json", headers=key)).json()["servers"] == [{"url": "/llm"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root_path": "llm"}, "must begin with /"),
        ({"root_path": "/llm/"}, "not end with one"),
        ({"root_path": "/v1"}, "root_path is /v1, with which the server's own paths begin"),
        ({"allowed_hosts": ["llm.example:8000"]}, "allowed_hosts has 'llm.example:8000'; give a name alone"),
        ({"allowed_hosts": ["https://llm.example"]}, "give a name alone"),
        ({"allowed_hosts": ["*.llm.example"]}, "give a name alone"),
        ({"allowed_hosts": ["a"], "uds": "/x"}, "leave it out with uds"),
        ({"allowed_origins": ["https://Example.org"]}, "in small letters"),
        ({"allowed_origins": ["example.org"]}, "allowed_origins has 'example.org'"),
        ({"ssl_certfile": "x"}, "TLS needs both"),
        ({"port": -1}, "port is -1"),
        ({"port": "8000"}, "port is '8000'; it must be a whole number"),
        ({"api_key": [1]}, "api_key is \\[1\\]; it must be a list of texts"),
        ({"on_engine_death": "exti"}, "restart or exit. Did you mean 'exit'"),
        ({"log_format": "xml"}, "it must be text or json"),
        ({"drain_seconds": float("nan")}, "drain_seconds is nan; it must be a number"),
        ({"max_body_bytes": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--api-key", "secret", "qwen2.5:7b"], "--api-key has taken 2 values, and no model is named; write the model"),
        (["--served-model-name", "a", "b"], "--served-model-name has taken 'a' and 'b', and no model is named"),
        (["--api-key", "ORG/MODEL"], "--api-key has taken 1 values, and no model is named"),  # of an empty variable
        (["--allowed-hosts", "smollm2:135m"], "--allowed-hosts has taken 'smollm2:135m', and no model is named"),
        (["smollm2:135m", "--api-key"], "argument --api-key: expected at least one argument"),
    ],
)
def test_a_model_that_a_list_has_taken(words: list[str], said: str):
    ended = subprocess.run([sys.executable, "-m", "octavo", "serve", *words], capture_output=True, text=True)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "secret" not in ended.stderr


def test_a_list_is_gathered_from_all_its_flags():
    from octavo.cli.options import Parser, add_options, from_args

    parser = Parser(prog="octavo serve")
    add_options(parser, ServerOptions, "server")
    words = ["--api-key", "a", "--allowed-hosts", "x", "--api-key", "b", "c", "--allowed-hosts", "y"]
    options = from_args(ServerOptions, parser.parse_args(words))
    assert (options.api_key, options.allowed_hosts) == (["a", "b", "c"], ["x", "y"])


# ---- TLS and Unix sockets --------------------------------------------------------------------------------------------


def certificate(folder: Path) -> tuple[dict[str, str], ssl.SSLContext]:
    """The server's options, and a client's context that trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for i, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(folder / "cert.pem", append=i > 0)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}, context


def test_tls(tmp_path: Path):
    options, context = certificate(tmp_path)
    with server(tmp_path, options=options) as process:
        assert process.url.startswith("https://127.0.0.1:")
        assert process.curl.startswith(f"curl {process.url}/v1/")
        http = openai.DefaultHttpxClient(verify=context)
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", http_client=http) as client:
            chunks = client.chat.completions.create(model="tiny", stream=True, **ask("hello"))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi, wörld! " * 3
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(process.url.replace("https", "http"))
        assert httpx.get(f"{process.url}/health", verify=context).status_code == 200
        assert "Traceback" not in process.log


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "key.pem").unlink(), "ssl_keyfile .* is no file that can be read"),
        (lambda folder: (folder / "cert.pem").write_text("no certificate"), "are no certificate in PEM and its key"),
        (lambda folder: (folder / "key.pem").write_text((folder / "cert.pem").read_text()), "no certificate in PEM"),
    ],
)
def test_tls_files_that_cannot_be_used(tmp_path: Path, break_it, message):
    from octavo.server.run import _tls_context

    options, _ = certificate(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ConfigError, match=message):
        _tls_context(ServerOptions(**options))


def test_a_unix_socket(tmp_path: Path):
    path = tmp_path / "socket"
    with server(tmp_path, options={"uds": str(path)}) as process:
        assert process.url == f"unix:{path}"
        assert process.curl.startswith(f"curl --unix-socket {path} http://localhost/v1/chat/completions")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.name") as client:
            assert client.get("/health").status_code == 200
            assert client.post("/v1/chat/completions", json=ask("hi")).json()["choices"]
        with pytest.raises(ConfigError, match="another program listens on it; choose another with --uds"):
            listen(ServerOptions(uds=str(path))).__enter__()
        process.process.terminate()
        assert process.ends() == 0
        assert not path.exists()
        assert "Traceback" not in process.log


def test_a_unix_socket_that_was_left_is_replaced_and_a_file_is_not(tmp_path: Path):
    path = tmp_path / "socket"
    with listen(ServerOptions(uds=str(path))):
        os.link(path, tmp_path / "left")  # a server that is killed leaves its file
    with listen(ServerOptions(uds=str(tmp_path / "left"))):
        assert stat.S_ISSOCK((tmp_path / "left").stat().st_mode)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="it is there already, and no socket"):
        listen(ServerOptions(uds=str(tmp_path / "file"))).__enter__()
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="No such file or directory"):
        listen(ServerOptions(uds=str(tmp_path / "nowhere" / "socket"))).__enter__()


def test_the_socket_of_another_program_stays(tmp_path: Path):
    path = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(ConfigError, match="another program listens on it"):
            listen(ServerOptions(uds=str(path))).__enter__()
        assert path.is_socket()
    path.unlink()
    with listen(ServerOptions(uds=str(path))):
        path.unlink()
        with listen(ServerOptions(uds=str(path))) as another:
            inode = path.stat().st_ino
            assert another.getsockname() == str(path)
            with listen(ServerOptions(uds=str(tmp_path / "third"))):
                pass
            assert path.stat().st_ino == inode


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_line_for_each_request(tmp_path: Path):
    options = {"log_requests": True, "log_format": "json", "api_key": "secret-key"}
    with server(tmp_path, options=options) as process:
        headers = {"Authorization": "Bearer secret-key", "X-Request-Id": "mine"}
        url = f"{process.url}/v1/chat/completions"
        answer = httpx.post(url, json=ask("a private question", n=2), headers=headers).json()
        httpx.post(url, json=ask("hi", stream=True, max_tokens=3), headers=headers)
        httpx.post(url, json=ask("hi"))
        httpx.get(f"{process.url}/health")
        lines = [json.loads(line) for line in process.log.splitlines()]
        assert {line["level"] for line in lines} == {"info"}
        whole, streamed, refused = [line for line in lines if "request_id" in line]
        times = [whole.pop(name) for name in ("queue_seconds", "first_token_seconds", "seconds")]
        assert all(0 <= seconds < 5 for seconds in times)
        assert whole.pop("message").startswith("POST /v1/chat/completions request_id=mine status=200")
        assert whole.pop("time")[:2] == "20"
        assert whole == {
            "level": "info",
            "process": "main",
            "method": "POST",
            "path": "/v1/chat/completions",
            "request_id": "mine",
            "status": 200,
            "answer_id": answer["id"],
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "cached_tokens": 0,
            "completion_tokens": answer["usage"]["completion_tokens"],
            "finish_reasons": ["stop", "stop"],
        }
        assert (streamed["finish_reasons"], streamed["completion_tokens"]) == (["length"], 3)
        assert refused["status"] == 401
        for secret in ("private", "wörld", "secret-key"):
            assert secret not in process.log


def test_a_line_as_text(tmp_path: Path):
    with server(tmp_path, options={"log_requests": True}) as process:
        httpx.post(f"{process.url}/v1/chat/completions", json=ask("hi", max_tokens=1))
        httpx.get(f"{process.url}/no%0Aline")
        first, second = process.log.splitlines()[-2:]
    assert "octavo: POST /v1/chat/completions request_id=" in first
    assert "status=200 answer_id=chatcmpl-" in first
    assert "finish_reasons=length" in first
    assert "GET /no\\nline request_id=" in second
