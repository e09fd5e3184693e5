"""Hub servers on loopback that speak Hugging Face's and ModelScope's protocols, with faults to order."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`files` by revision name; the faults stand in the other fields and are used up where they are counts."""

    repo_id: str = "octo/tiny.1"
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", "master", COMMIT)
    token: str = ""  # without it the answer is 401
    cuts: int = 0  # answers that break off in the middle of a file of more than 1000 bytes
    ignores_ranges: bool = False  # an answer is the whole file, whatever was asked for
    extra: int = 0  # bytes that come behind a file's last
    cut_files: set[str] = field(default_factory=set)  # whose answers always break off
    missing: set[str] = field(default_factory=set)  # that are listed, and are not there
    wrong_sums: bool = False  # listed checksums belong to other bytes
    asked: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    url: str = ""

    def sum_of(self, content: bytes) -> str:
        return hashlib.sha256(content + b"!" * self.wrong_sums).hexdigest()


class Answer(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        hub.asked[parts.path] += 1
        if hub.token and hub.token not in self.headers.get("Authorization", ""):
            return self.refuse(401)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        prefix = f"/api/v1/models/{hub.repo_id}/repo"
        if parts.path == prefix + "/files":
            return self.modelscope_list(query["Revision"])
        if parts.path == prefix:
            return self.send_file(query["Revision"], query["FilePath"])
        return self.hugging_face(parts.path)

    def hugging_face(self, path: str) -> None:
        hub = self.hub
        api = f"/api/models/{hub.repo_id}"
        if path == api or path.startswith(api + "/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            if revision not in hub.revisions:
                return self.refuse(404, "RevisionNotFound")
            siblings = [
                {"rfilename": name, "size": len(content), "lfs": self.lfs(name, content)}
                for name, content in hub.files.items()
            ]
            return self.send_json({"id": hub.repo_id, "sha": COMMIT, "siblings": siblings})
        if path.startswith(f"/{hub.repo_id}/resolve/"):
            revision, _, name = path.removeprefix(f"/{hub.repo_id}/resolve/").partition("/")
            return self.send_file(revision, name)
        return self.refuse(404, "RepoNotFound")

    def lfs(self, name: str, content: bytes) -> dict[str, object] | None:
        if not name.endswith((".safetensors", ".gguf")):
            return None
        return {"sha256": self.hub.sum_of(content), "size": len(content), "pointerSize": 1}

    def modelscope_list(self, revision: str) -> None:
        if revision not in self.hub.revisions:
            return self.refuse(404)
        files: list[dict[str, object]] = [{"Path": "folder", "Name": "folder", "Type": "tree", "Size": 0}]
        files += [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(content), "Sha256": self.hub.sum_of(content)}
            for name, content in self.hub.files.items()
        ]
        return self.send_json({"Code": 200, "Data": {"Files": files}})

    def send_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, revision: str, name: str) -> None:
        hub = self.hub
        if revision not in hub.revisions or name not in hub.files or name in hub.missing:
            return self.refuse(404, "EntryNotFound")
        content, start, end = hub.files[name], 0, len(hub.files[name])
        if wanted := self.headers.get("Range"):
            hub.ranges.append(wanted)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if hub.ignores_ranges:
                wanted = None
            else:
                start, end = int(first), min(end, int(last) + 1 if last else end)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        extra = hub.extra if name.endswith(".safetensors") and end == len(content) else 0
        self.send_header("Content-Length", str(end - start + extra))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if (hub.cuts and end - start > 1000) or name in hub.cut_files:
            hub.cuts -= name not in hub.cut_files
            self.wfile.write(content[start : start + (end - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(content[start:end])
        with suppress(ConnectionError):
            self.wfile.write(bytes(extra))
        return None

    def refuse(self, code: int, word: str = "") -> None:
        self.send_response(code)
        if word:
            self.send_header("X-Error-Code", word)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serves `hub` on a free port; its address is then `hub.url`."""
    handler = type("Handler", (Answer,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
