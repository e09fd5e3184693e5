"""ModelScope's hub over its REST interface, by the standard library alone (decision 0060).

Files are fetched (`download`) into a folder of their own; the snapshot's gets them when all are there. The layout is
ModelScope's newer client's.
"""

import http.client
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.checkpoint.caches import modelscope_roots
from octavo.checkpoint.download import Arriving, Download, Interrupted
from octavo.checkpoint.fetch_progress import FetchProgress
from octavo.checkpoint.locked import locked
from octavo.checkpoint.repository import Listing, RepositoryFile, safe_path, safe_sha256
from octavo.errors import DownloadError

_CHUNK = 1 << 20
_TIMEOUT = 30.0
_DOMAIN = "www.modelscope.cn"


class ModelScope:
    """The hub at MODELSCOPE_ENDPOINT or MODELSCOPE_DOMAIN, as a `repository.Hub`."""

    name = "modelscope"
    title = "ModelScope"
    variable = "MODELSCOPE_CACHE"

    immutable = False  # a branch's folder holds whatever the branch held when it was fetched

    def __init__(self) -> None:
        named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or _DOMAIN
        self.endpoint = (named if "://" in named else f"https://{named}").rstrip("/")

    def list_files(self, repo_id: str, revision: str | None) -> Listing:
        revision = revision or "master"
        url = self._url(f"{repo_id}/repo/files", Revision=revision, Recursive="True")
        try:
            answer = json.loads(self._get(url, repo_id).read())
            files = tuple(
                RepositoryFile(safe_path(entry["Path"]), int(entry["Size"]), safe_sha256(entry.get("Sha256") or ""))
                for entry in answer["Data"]["Files"]
                if entry.get("Type") != "tree"
            )
        except urllib.error.HTTPError as error:
            raise self._refused(error, repo_id, revision) from None
        except (ValueError, TypeError, KeyError):
            raise DownloadError(
                f"{self.endpoint} answered the list of {repo_id} with something else than files; check"
                " MODELSCOPE_ENDPOINT, MODELSCOPE_DOMAIN and the proxy"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(repo_id, error) from None
        return Listing(repo_id, revision, revision, files)

    def folder(self, listing: Listing) -> Path:
        return self._home(listing) / "snapshots" / listing.revision

    def fetch(self, listing: Listing, files: Sequence[RepositoryFile], progress: FetchProgress) -> None:
        target, home = self.folder(listing), self._home(listing)
        home.mkdir(parents=True, exist_ok=True)
        with locked(home, listing.repo_id):
            for download in (self._download(listing, file) for file in files):
                download.run(progress)
            for file in files:
                (target / file.path).parent.mkdir(parents=True, exist_ok=True)
                (self._staging(listing) / file.path).replace(target / file.path)
            shutil.rmtree(self._staging(listing), ignore_errors=True)  # parts of other versions

    def num_fetched(self, listing: Listing, files: Sequence[RepositoryFile]) -> int:
        return sum(self._download(listing, file).num_there() for file in files)

    def settle(self, listing: Listing) -> None:
        """Nothing to note: a snapshot's folder has the revision's name."""

    def read_range(self, listing: Listing, file: RepositoryFile, start: int, end: int) -> bytes:
        try:
            with self._get(self._file_url(listing, file), listing.repo_id, start, end) as answer:
                if answer.status == 200:
                    answer.read(start)
                content: bytes = answer.read(end - start)
                return content
        except urllib.error.HTTPError as error:
            raise self._refused(error, listing.repo_id, listing.revision) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(listing.repo_id, error) from None

    def _download(self, listing: Listing, file: RepositoryFile) -> Download:
        def differs(found: str) -> DownloadError:
            return DownloadError(
                f"{file.path} of {listing.repo_id} as fetched has sha256 {found} instead of {file.sha256}; run the"
                " command again, or use another MODELSCOPE_DOMAIN"
            )

        return Download(
            self._staging(listing) / file.path,
            file.size,
            file.sha256,
            lambda start: self._arriving(listing, file, start),
            lambda error: self._unreachable(listing.repo_id, error),
            differs,
        )

    @contextmanager
    def _arriving(self, listing: Listing, file: RepositoryFile, start: int) -> Iterator[Arriving]:
        try:
            answer = self._get(self._file_url(listing, file), listing.repo_id, start, None)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise self._refused(error, listing.repo_id, listing.revision) from None
            raise Interrupted from error
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted from error

        def pieces() -> Iterator[bytes]:
            while True:
                try:
                    piece = answer.read(_CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise Interrupted from error
                if not piece:
                    return
                yield piece

        with answer:
            yield Arriving(answer.status == 206, pieces())

    def _staging(self, listing: Listing) -> Path:
        return self._home(listing) / "fetching" / listing.revision

    def _get(self, url: str, repo_id: str, start: int = 0, end: int | None = None) -> Any:
        """An open answer; raises what urllib raises."""
        request = urllib.request.Request(url, headers={"User-Agent": "octavo"})
        if token := os.environ.get("MODELSCOPE_API_TOKEN"):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
            request.add_unredirected_header("Cookie", f"m_session_id={token}")
        if start or end is not None:
            request.add_header("Range", f"bytes={start}-{'' if end is None else end - 1}")
        return urllib.request.urlopen(request, timeout=_TIMEOUT)

    def _url(self, path: str, **query: str) -> str:
        return f"{self.endpoint}/api/v1/models/{path}?{urllib.parse.urlencode(query)}"

    def _file_url(self, listing: Listing, file: RepositoryFile) -> str:
        return self._url(f"{listing.repo_id}/repo", Revision=listing.revision, FilePath=file.path)

    def _home(self, listing: Listing) -> Path:
        return modelscope_roots()[-1] / "models" / listing.repo_id.replace("/", "--")

    def _refused(self, error: urllib.error.HTTPError, repo_id: str, revision: str) -> DownloadError:
        error.close()
        if error.code in (401, 403):
            return DownloadError(
                f"{repo_id} may not be read without rights ({error.code} from {self.endpoint}): set"
                " MODELSCOPE_API_TOKEN to a token of your account"
            )
        if error.code == 404:
            return DownloadError(
                f"{repo_id} with revision {revision!r} is not on {self.endpoint}: check both names"
                " (--hub hf looks on Hugging Face)"
            )
        return DownloadError(f"{self.endpoint} answered {error.code} for {repo_id}; try again later, or --hub hf")

    def _unreachable(self, repo_id: str, error: Exception) -> DownloadError:
        said = getattr(error, "reason", None) or error
        return DownloadError(
            f"{repo_id} is not on this machine and could not be fetched from {self.endpoint}: {said} --"
            " check network and proxy and run the command again (it goes on where it stopped), or use --hub hf"
        )
