"""Models from Hugging Face and ModelScope: fetched, resumed, checked, found again; and all that can go wrong."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.checkpoint import download, hubs, locate, modelscope, open_checkpoint
from octavo.checkpoint.repository import RepositoryName, choose_paths
from octavo.errors import CheckpointError, ConfigError, DownloadError
from tests.checkpoint.denied import deny_reading
from tests.checkpoint.fake_hubs import COMMIT, FakeHub, serving

NAME = "octo/tiny.1"
HUBS = ("hf", "modelscope")


def safetensors(**tensors: list[int]) -> bytes:
    """A file of fp32 zeros of the given shapes."""
    header, position = {}, 0
    for name, shape in tensors.items():
        size = 4
        for width in shape:
            size *= width
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(position)


FILES = {
    "README.md": b"words",
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(weight=[64, 64]),
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"again",
}
NEEDED = {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "USE_HF",
        "MODELSCOPE_API_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setattr(download, "PAUSE", 0.01)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub(NAME, dict(FILES))) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.url)
        yield hub


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fails(hub: str, words: str, name: str = NAME, revision: str | None = None) -> None:
    with pytest.raises((DownloadError, CheckpointError)) as raised:
        locate(name, hub, revision)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("hub", HUBS)
def test_fetches_what_is_needed(hub: str, server: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = locate(NAME, hub)
    assert names(folder) == NEEDED
    assert all((folder / name).read_bytes() == FILES[name] for name in NEEDED)
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith(f"Fetching {NAME} from ")
    assert err[-1].startswith(f"Fetched {NAME} in ")
    assert list(open_checkpoint(NAME, hub=hub).tensors) == ["weight"]


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.parametrize("asked", ["same", "auto"])
def test_the_second_time_asks_nobody(hub: str, asked: str, server: FakeHub) -> None:
    first = locate(NAME, hub)
    server.asked.clear()
    assert locate(NAME, hub if asked == "same" else "auto") == first
    assert server.asked == Counter()


@pytest.mark.parametrize("hub", HUBS)
def test_goes_on_after_a_cut(hub: str, server: FakeHub) -> None:
    server.cuts = 1
    folder = locate(NAME, hub)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [wanted for wanted in server.ranges if not wanted.startswith("bytes=0-")]


@pytest.mark.parametrize("hub", HUBS)
def test_goes_on_in_the_next_run(hub: str, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.cuts = 1
    monkeypatch.setattr(download, "MOST_TRIES", 1)
    fails(hub, "goes on where it stopped")
    assert hubs.find(RepositoryName(NAME), hub, None) is None
    half = len(FILES["model.safetensors"]) // 2
    # What is there already needs no room on the disk.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 5, half + 200))
    assert (locate(NAME, hub) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert server.ranges == [f"bytes={half}-"]


@pytest.mark.parametrize("hub", HUBS)
def test_a_server_without_ranges_begins_anew(hub: str, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.cuts, server.ignores_ranges = 2, True
    assert (locate(NAME, hub) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert server.ranges


def test_a_part_that_is_too_long_is_thrown_away(server: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "modelscope/models/octo--tiny.1/fetching/master"
    home.mkdir(parents=True)
    (home / "model.safetensors.part").write_bytes(b"x" * (len(FILES["model.safetensors"]) + 1))
    assert (locate(NAME, "modelscope") / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_shards_of_hugging_face_come_at_once_and_stop_together(server: FakeHub, tmp_path: Path) -> None:
    shards = {f"model-{i:05}-of-00006.safetensors": safetensors(**{f"w{i}": [40 + i, 64]}) for i in range(6)}
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}
    files = {**shards, "config.json": FILES["config.json"], "model.safetensors.index.json": json.dumps(index).encode()}
    server.files = files
    server.wrong_sums = True
    fails("hf", "sha256")
    server.wrong_sums = False
    folder = locate(NAME, "hf")
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert len(open_checkpoint(NAME, hub="hf").tensors) == 6


@pytest.mark.parametrize("hub", HUBS)
def test_a_wrong_checksum_leaves_nothing_to_use(hub: str, server: FakeHub) -> None:
    server.wrong_sums = True
    fails(hub, "sha256")
    assert hubs.find(RepositoryName(NAME), hub, None) is None
    server.wrong_sums = False
    assert names(locate(NAME, hub)) == NEEDED


@pytest.mark.parametrize(("hub", "variable"), [("hf", "HF_HOME"), ("modelscope", "MODELSCOPE_CACHE")])
def test_a_full_disk_is_found_before_the_first_byte(
    hub: str, variable: str, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    fails(hub, f"set {variable} to a folder on another disk")
    assert not any("resolve" in path or path.endswith("/repo") for path in server.asked)


@pytest.mark.parametrize(("hub", "variable"), [("hf", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_what_needs_a_token(hub: str, variable: str, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "secret-word"
    fails(hub, variable)
    monkeypatch.setenv(variable, "secret-word")
    assert names(locate(NAME, hub)) == NEEDED


@pytest.mark.parametrize("hub", HUBS)
def test_names_that_are_not_there(hub: str, server: FakeHub) -> None:
    fails(hub, "octo/absent", name="octo/absent")
    fails(hub, "revision 'v9'", revision="v9")


@pytest.mark.parametrize("hub", HUBS)
def test_revisions_are_kept_apart(hub: str, server: FakeHub) -> None:
    server.revisions += ("v2",)
    locate(NAME, hub)
    assert hubs.find(RepositoryName(NAME), hub, "v2") is None
    folder = locate(NAME, hub, "v2")
    server.asked.clear()
    assert locate(NAME, hub, "v2") == folder
    assert not server.asked
    if hub == "hf":
        assert folder.name == COMMIT


def test_unreachable_hubs_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.setattr(modelscope, "_TIMEOUT", 1)
    for hub in HUBS:
        fails(hub, "check network and proxy")


def test_offline_is_obeyed(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("hf", "HF_HUB_OFFLINE")
    assert not server.asked


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    fails("hf", "pip install 'octavo[hub]'")


@pytest.mark.parametrize(("said", "hub"), [("", "hf"), ("1", "hf"), ("0", "modelscope")])
def test_use_hf_chooses(said: str, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_HF", said)
    assert hubs.choose("auto").name == hub


def test_use_hf_with_another_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_HF", "perhaps")
    with pytest.raises(ConfigError, match="USE_HF is 'perhaps'"):
        hubs.choose("auto")


@pytest.mark.parametrize(
    "place", ["{0}/octo/tiny___1", "{0}/models/octo/tiny___1", "{0}/models/octo--tiny.1/snapshots/master"]
)
def test_modelscopes_layouts_are_used_in_place(place: str, tmp_path: Path) -> None:
    folder = Path(place.format(tmp_path / "modelscope"))
    folder.mkdir(parents=True)
    for name in NEEDED - {"model.safetensors"}:
        (folder / name).write_bytes(FILES[name])
    assert hubs.find(RepositoryName(NAME), "auto", None) is None, "a folder without weights is not a model"
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])
    assert locate(NAME) == folder


def test_a_shard_that_is_not_there_yet(tmp_path: Path) -> None:
    folder = tmp_path / "modelscope/models/octo/tiny___1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert hubs.find(RepositoryName(NAME), "auto", None) is None


GGUF = ["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"]


def test_choosing_files() -> None:
    name = RepositoryName.parse(f"{NAME}:q4_k_m")
    assert name == RepositoryName(NAME, "q4_k_m")
    assert choose_paths(name, GGUF) == GGUF[:1]
    assert choose_paths(RepositoryName(NAME, GGUF[1]), GGUF) == GGUF[1:]
    assert choose_paths(RepositoryName(NAME), GGUF[:1]) == GGUF[:1]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert choose_paths(RepositoryName(NAME), [*shards, "consolidated.safetensors", index]) == [index, *shards]


@pytest.mark.parametrize(
    ("file", "paths", "words"),
    [
        (None, GGUF, "several GGUF files; name one as octo/tiny.1:FILE"),
        ("Q5_0", GGUF, "no such GGUF file"),
        (None, ["config.json", "pytorch_model.bin"], "a pickle, which can run code"),
        (None, ["config.json"], "neither safetensors nor GGUF"),
    ],
)
def test_repositories_that_cannot_be_used(file: str | None, paths: list[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        choose_paths(RepositoryName(NAME, file), paths)


@pytest.mark.parametrize("hub", HUBS)
def test_one_gguf_file_of_many(hub: str, server: FakeHub) -> None:
    server.files = {name: name.encode() * 200 for name in GGUF} | {"config.json": b"{}"}
    path = locate(f"{NAME}:Q8_0", hub)
    assert path.read_bytes() == server.files[GGUF[1]]
    server.asked.clear()
    assert locate(f"{NAME}:Q8_0", hub) == path
    assert not server.asked
    assert locate(f"{NAME}:Q4_K_M", hub).name == GGUF[0]


def test_a_cache_that_cannot_be_written(server: FakeHub, tmp_path: Path) -> None:
    for hub, variable in (("hf", "HF_HOME"), ("modelscope", "MODELSCOPE_CACHE")):
        (tmp_path / hub).write_text("a file where the folder should be")
        fails(hub, f"set {variable} to another folder")


def test_a_cache_of_another_user(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for hub in HUBS:
        with monkeypatch.context() as patch:
            deny_reading(patch, tmp_path / hub)
            fails(hub, "cannot be read: Permission denied; let this user read it, or set HF_HOME or MODELSCOPE_CACHE")


def test_an_interrupted_fetch_ends_with_files_of_one_time(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before the repository changed is not what is listed after it."""
    monkeypatch.setattr(download, "MOST_TRIES", 1)
    server.cuts = 1
    fails("modelscope", "goes on where it stopped")
    changed = {
        "config.json": b'{"new": 1}',
        "tokenizer.json": b'{"new": 22}',
        "model.safetensors": safetensors(w=[64, 64]),
    }
    server.files |= changed
    folder = locate(NAME, "modelscope")
    assert {name: (folder / name).read_bytes() for name in changed} == changed
    assert not (folder.parent.parent / "fetching" / "master").exists()


def test_an_update_sees_other_content_of_the_same_size(server: FakeHub) -> None:
    folder = locate(NAME, "modelscope")
    weights = bytearray(FILES["model.safetensors"])
    weights[-1] = 7
    server.files["model.safetensors"] = bytes(weights)
    assert locate(NAME, "modelscope") == folder
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    hubs.pull(RepositoryName(NAME), "modelscope", None)
    assert (folder / "model.safetensors").read_bytes() == bytes(weights)


def test_two_files_of_one_content(server: FakeHub) -> None:
    shard = safetensors(weight=[300, 300])
    del server.files["model.safetensors"]
    names_of_shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    server.files |= dict.fromkeys(names_of_shards, shard)
    folder = locate(NAME, "hf")
    assert [(folder / name).read_bytes() == shard for name in names_of_shards] == [True, True]


@pytest.mark.parametrize("hub", HUBS)
def test_more_than_was_listed_is_not_kept(hub: str, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MOST_TRIES", 2)
    server.extra = 5_000_000
    fails(hub, NAME)
    parts = [path.stat().st_size for path in Path(os.environ["HF_HOME"]).parent.rglob("*.part")]
    assert max(parts, default=0) < 3_000_000


def test_hashes_and_commits_of_a_listing_are_none_but_that(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeHub, "sum_of", lambda self, content: "../../../../victim/notes")
    for hub in HUBS:
        fails(hub, "lists the SHA-256 '../../../../victim/notes', which is none")
    monkeypatch.undo()


def test_a_name_outside_of_its_repository(server: FakeHub) -> None:
    server.files["../../evil.json"] = b"{}"
    for hub in HUBS:
        fails(hub, "lies outside its repository")


def test_a_revision_with_a_slash_is_found_again(server: FakeHub) -> None:
    server.revisions += ("feature/x",)
    folder = locate(NAME, "modelscope", "feature/x")
    server.asked.clear()
    assert locate(NAME, "modelscope", "feature/x") == folder
    assert not server.asked


def test_who_stops_waits_for_no_pause(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 30.0)
    del server.files["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": safetensors(weight=[300 + i, 300]) for i in (1, 2)}
    server.files |= shards
    server.cut_files = {next(iter(shards))}
    server.missing = {list(shards)[1]}
    began = time.monotonic()
    fails("hf", "")
    assert time.monotonic() - began < 10


def test_an_update_asks_the_hub_again(server: FakeHub) -> None:
    folder = locate(NAME, "modelscope")
    server.files["config.json"] = b'{"architectures": ["another"]}'
    assert hubs.pull(RepositoryName(NAME), "modelscope", None) == folder
    assert (folder / "config.json").read_bytes() == server.files["config.json"]


def test_a_revision_is_no_path() -> None:
    with pytest.raises(ConfigError, match=r"revision is '\.\./x'"):
        locate(NAME, "hf", "../x")


def test_a_listing_cannot_leave_its_folder(server: FakeHub) -> None:
    server.files["../../outside.safetensors"] = b"x"
    fails("modelscope", "outside its repository")
