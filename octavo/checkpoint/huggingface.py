"""Hugging Face's hub through its own client, `huggingface_hub`, which is imported only when it is needed.

The client keeps its cache and knows HF_TOKEN; endpoint and folder are passed, so that they are the ones that `caches`
looks at. Large files are fetched here (`download`), since the client begins anew what was interrupted, several at once,
to where the client then finds them; that they have the SHA-256 that the hub lists is checked.
"""

import hashlib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from octavo.checkpoint.caches import hf_cache
from octavo.checkpoint.download import Arriving, Download, Interrupted
from octavo.checkpoint.fetch_progress import FetchProgress
from octavo.checkpoint.locked import locked
from octavo.checkpoint.repository import Listing, RepositoryFile, safe_path, safe_sha256
from octavo.errors import DownloadError

_AT_ONCE = 4  # files


class HuggingFace:
    """The hub at HF_ENDPOINT (https://huggingface.co by default), as a `repository.Hub`."""

    immutable = True  # a commit's folder
    name = "hf"
    title = "Hugging Face"
    variable = "HF_HOME"

    def __init__(self) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def list_files(self, repo_id: str, revision: str | None) -> Listing:
        client = _client(repo_id)
        with _translated(repo_id, revision, self.endpoint):
            info = client.HfApi(endpoint=self.endpoint).model_info(
                repo_id, revision=revision, files_metadata=True, timeout=30
            )
        files = tuple(
            RepositoryFile(
                safe_path(entry.rfilename), entry.size or 0, safe_sha256(entry.lfs.sha256 if entry.lfs else "")
            )
            for entry in info.siblings or ()
        )
        if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
            raise DownloadError(f"{self.endpoint} names no commit of {repo_id}; check HF_ENDPOINT")
        return Listing(repo_id, revision or "main", info.sha, files)

    def folder(self, listing: Listing) -> Path:
        return self._home(listing.repo_id) / "snapshots" / listing.revision

    def fetch(self, listing: Listing, files: Sequence[RepositoryFile], progress: FetchProgress) -> None:
        client = _client(listing.repo_id)
        home = self._home(listing.repo_id)
        home.mkdir(parents=True, exist_ok=True)
        with locked(home, listing.repo_id), ThreadPoolExecutor(_AT_ONCE) as threads:
            large = [self._download(client, listing, file) for file in _large(files)]
            running = [threads.submit(download.run, progress) for download in large]
            try:
                for each in wait(running, return_when=FIRST_EXCEPTION).done:
                    each.result()
            except BaseException:
                progress.stop()  # the others end at their next piece
                raise
            finally:
                threads.shutdown(cancel_futures=True)
        for file in files:
            with _translated(listing.repo_id, listing.revision, self.endpoint):
                # The client finds what was fetched by its hash, and links it into the snapshot.
                path = client.hf_hub_download(
                    listing.repo_id,
                    file.path,
                    revision=listing.revision,
                    cache_dir=hf_cache(),
                    endpoint=self.endpoint,
                    **_bar_settings(client, progress, counted=bool(file.sha256)),
                )
            _check(Path(path), file)

    def num_fetched(self, listing: Listing, files: Sequence[RepositoryFile]) -> int:
        client = _client(listing.repo_id)
        return sum(self._download(client, listing, file).num_there() for file in _large(files))

    def _download(self, client: Any, listing: Listing, file: RepositoryFile) -> Download:
        return Download(
            self._home(listing.repo_id) / "blobs" / file.sha256,
            file.size,
            file.sha256,
            lambda start: self._arriving(client, listing, file, start),
            lambda error: DownloadError(_unreachable(listing.repo_id, self.endpoint, error)),
            lambda found: _differs(file, found),
        )

    @contextmanager
    def _arriving(self, client: Any, listing: Listing, file: RepositoryFile, start: int) -> Iterator[Arriving]:
        url = client.hf_hub_url(listing.repo_id, file.path, revision=listing.revision, endpoint=self.endpoint)
        headers = client.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with ExitStack() as stack:
            with _translated(listing.repo_id, listing.revision, self.endpoint):
                request = client.get_session().stream("GET", url, headers=headers, timeout=30, follow_redirects=True)
                try:
                    answer = stack.enter_context(request)
                except Exception as error:  # the client's transport has changed, and with it what it raises
                    raise Interrupted from error
                if answer.status_code >= 500 or answer.status_code in (408, 429):
                    raise Interrupted(f"{answer.status_code} from {self.endpoint}")
                client.utils.hf_raise_for_status(answer)
            yield Arriving(answer.status_code == 206, _pieces(answer))

    def read_range(self, listing: Listing, file: RepositoryFile, start: int, end: int) -> bytes:
        client = _client(listing.repo_id)
        with _translated(listing.repo_id, listing.revision, self.endpoint):
            url = client.hf_hub_url(listing.repo_id, file.path, revision=listing.revision, endpoint=self.endpoint)
            headers = client.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
            headers["Range"] = f"bytes={start}-{end - 1}"
            request = client.get_session().stream("GET", url, headers=headers, timeout=30, follow_redirects=True)
            with request as answer:
                client.utils.hf_raise_for_status(answer)
                # Whoever ignores the range sends all of the file, of which no more is read.
                skipped = 0 if answer.status_code == 206 else start
                content = bytearray()
                for piece in _pieces(answer):
                    content += piece
                    if len(content) >= skipped + end - start:
                        break
        return bytes(content[skipped : skipped + end - start])

    def settle(self, listing: Listing) -> None:
        # The client notes what a name meant when it fetches by that name; it fetches by commit here.
        if listing.asked != listing.revision:
            reference = self._home(listing.repo_id) / "refs" / listing.asked
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(listing.revision, "utf-8")

    def _home(self, repo_id: str) -> Path:
        return hf_cache() / f"models--{repo_id.replace('/', '--')}"


def _large(files: Sequence[RepositoryFile]) -> list[RepositoryFile]:
    """Those that are fetched by their hash, each content once."""
    return list({file.sha256: file for file in files if file.sha256}.values())


def _pieces(answer: Any) -> Iterator[bytes]:
    pieces = answer.iter_raw()  # as they arrive: a chunk in the making would be lost with the connection
    while True:
        try:
            piece = next(pieces, b"")
        except Exception as error:
            raise Interrupted from error
        if not piece:
            return
        yield piece


def _client(repo_id: str) -> Any:
    """The module `huggingface_hub`; raises `DownloadError` if it is missing or told to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DownloadError(
            f"{repo_id} is not whole in the cache {hf_cache()}, and HF_HUB_OFFLINE forbids to fetch it; unset that"
            " variable, or pull the model on a machine that is online and copy the cache"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise DownloadError(
            f"{repo_id} is not in the cache, and fetching from Hugging Face needs its client:"
            " pip install 'octavo[hub]' (or --hub modelscope, which needs nothing)"
        ) from None
    return huggingface_hub


@contextmanager
def _translated(repo_id: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """The client's errors as one line with the fix."""
    from huggingface_hub import errors

    try:
        yield
    except (DownloadError, Interrupted):
        raise
    except errors.GatedRepoError:
        raise DownloadError(
            f"{repo_id} asks for its conditions to be accepted: do so at {endpoint}/{repo_id}, then set HF_TOKEN to a"
            " token of your account"
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{repo_id} has no revision {revision!r}; name a branch, tag or commit of it") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{repo_id} is neither a folder here nor on {endpoint}, or it is private: check the name, or set HF_TOKEN"
            " to a token that may read it (--hub modelscope looks on ModelScope)"
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403):
            raise DownloadError(
                f"{repo_id} may not be read without rights ({code} from {endpoint}): set HF_TOKEN to a token that may"
            ) from None
        raise DownloadError(_unreachable(repo_id, endpoint, error)) from None
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise DownloadError(
                f"cannot write to {error.filename}: {error.strerror}; set HF_HOME to another folder"
            ) from None
        raise DownloadError(_unreachable(repo_id, endpoint, error)) from None
    except Exception as error:
        # The client's transport has changed (requests, httpx) and with it what it raises when the net is down.
        raise DownloadError(_unreachable(repo_id, endpoint, error)) from None


def _unreachable(repo_id: str, endpoint: str, error: Exception) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{repo_id} is not on this machine and could not be fetched from {endpoint}: {said[0]} -- check network and"
        " proxy and run the command again (it goes on where it stopped), set HF_ENDPOINT to a mirror, or use"
        " --hub modelscope"
    )


def _bar_settings(client: Any, progress: FetchProgress, counted: bool) -> dict[str, Any]:
    """Lets the client count into `progress`, unless the file is `counted` already; an older one, which cannot, shows
    its own bars."""
    known = inspect.signature(client.hf_hub_download).parameters
    return {"tqdm_class": _counting(progress, counted)} if "tqdm_class" in known else {}


def _counting(progress: FetchProgress, counted: bool) -> type[Any]:
    """The class that the client makes its bars of, here one that shows nothing and counts."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Counting(tqdm):  # type: ignore[misc]
        def __init__(self, *_: Any, **settings: Any):
            settings.pop("name", None)
            super().__init__(**(settings | {"disable": True}))
            self.update(settings.get("initial"))

        def update(self, n: float | None = 1) -> None:
            progress.advance(0 if counted else int(n or 0))

    return Counting


def _check(path: Path, file: RepositoryFile) -> None:
    """Compares with the listed SHA-256; a file that differs is removed, so that the next fetch begins anew."""
    if not file.sha256:
        return
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != file.sha256:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise _differs(file, found)


def _differs(file: RepositoryFile, found: str) -> DownloadError:
    return DownloadError(
        f"{file.path} as fetched has sha256 {found} instead of {file.sha256}; run the command again, or set HF_ENDPOINT"
        " to another mirror"
    )
