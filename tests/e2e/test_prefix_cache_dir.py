"""The prefix cache on disk under a whole engine: a restart finds it, another kind of engine does not, a kill tears
nothing that is served."""

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.errors import ConfigError
from octavo.kernels import library
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.builds import CHOSEN, choose
from tests.tiny_models import save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("models") / "llama"))


def build(model: str, folder: Path, **options: Any) -> Engine:
    asked = {"kv_cache_memory": "4MiB", "max_model_len": 128, "prefix_cache_dir": str(folder)} | options
    return Engine.build(EngineOptions(model=model, **asked))


def requests() -> list[Request]:
    rng = random.Random(3)
    made = []
    for i in range(6):
        prompt = [rng.randrange(3, 160) for _ in range(20 + 12 * i)]
        params = SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.8, seed=i, logprobs=2, n=1 + i % 2)
        made.append(Request(f"r{i}", prompt, params))
    return made


def answer(engine: Engine) -> dict[tuple[str, int], list[Any]]:
    answers: dict[tuple[str, int], list[Any]] = {}
    for request in requests():
        engine.add(request)
    while engine.has_work():
        for name, index, token, _, _, logprobs in engine.step().tokens:
            answers.setdefault((name, index), []).append((token, logprobs))
        engine.scheduler.check()
    return answers


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain torch"])
def test_found_after_a_restart(
    model: str, tmp_path: Path, plain: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if plain:
        choose(monkeypatch, None)
    elif library.load() is None:
        pytest.skip("this installation has no kernels")
    first = build(model, tmp_path)
    cold = answer(first)
    assert first.stats().blocks_loaded == 0
    first.shutdown()
    saved = len(list(tmp_path.glob("*.kv")))
    assert saved >= sum(len(r.prompt_token_ids) // 16 for r in requests())

    second = build(model, tmp_path)
    warm = answer(second)
    assert second.stats().blocks_loaded >= sum((len(r.prompt_token_ids) - 1) // 16 for r in requests())
    tokens = [{key: [token for token, _ in found] for key, found in answers.items()} for answers in (cold, warm)]
    assert tokens[0] == tokens[1]
    assert plain or cold == warm, "on the kernels logprobs are equal bit for bit"
    second.shutdown()
    assert len(list(tmp_path.glob("*.kv"))) == saved, "nothing was written twice"


def test_what_bits_depend_on_keeps_blocks_apart(
    model: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(model, tmp_path)
    answer(first)
    first.shutdown()

    def loaded(model: str, **options: Any) -> int:
        engine = build(model, tmp_path, **options)
        answer(engine)
        engine.shutdown()
        return engine.stats().blocks_loaded

    assert loaded(str(save_llama(tmp_path_factory.mktemp("models") / "other", seed=1))) == 0
    copy = tmp_path_factory.mktemp("models") / "copy"
    assert loaded(str(save_llama(copy))) > 0, "the same weights elsewhere"
    assert loaded(model, dtype="float32") == 0
    assert loaded(model, block_size=32) == 0
    if library.load() is not None:
        assert loaded(model, quantize="int8") == 0
        assert loaded(model, kv_cache_dtype="int8") == 0
        assert loaded(model, kv_cache_dtype="int8") > 0
        others = [name for name in library.builds() if name != CHOSEN and library.load(name)]
        for name in others[:1]:
            with monkeypatch.context() as patch:
                choose(patch, name)
                assert loaded(model) == 0
    with monkeypatch.context() as patch:
        choose(patch, None)
        assert loaded(model, dtype="bfloat16") == 0


def test_a_damaged_block_is_computed_again(model: str, tmp_path: Path) -> None:
    first = build(model, tmp_path)
    cold = answer(first)
    first.shutdown()
    files = sorted(tmp_path.glob("*.kv"))
    for path in files[::2]:
        raw = bytearray(path.read_bytes())
        raw[-7] ^= 255
        path.write_bytes(raw)
    second = build(model, tmp_path)
    warm = answer(second)
    assert {key: [t for t, _ in found] for key, found in warm.items()} == {
        key: [t for t, _ in found] for key, found in cold.items()
    }
    assert second.stats().blocks_loaded < len(files)


KILLED = """
import sys
from tests.e2e.test_prefix_cache_dir import Path, Request, SamplingParams, build, random
engine = build(sys.argv[1], Path(sys.argv[2]))
rng = random.Random(9)
for i in range(10**9):
    engine.add(Request(f"q{i}", [rng.randrange(3, 160) for _ in range(100)], SamplingParams(max_tokens=2)))
    while engine.has_work():
        engine.step()
    if i == 5:
        print("writing", flush=True)
"""


def test_killed_while_it_writes(model: str, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, model, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    rng = random.Random(9)
    asked = [rng.randrange(3, 160) for _ in range(100)]
    request = Request("again", asked, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    answers = []
    for folder in (tmp_path, tmp_path / "empty"):
        engine = build(model, folder)
        engine.add(request)
        answers.append([token for _ in range(8) for _, _, token, *_ in engine.step().tokens])
        assert (engine.stats().blocks_loaded > 0) == (folder == tmp_path)
        engine.shutdown()
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix_cache_dir": "/proc/nowhere"}, "prefix_cache_dir is '/proc/nowhere'"),
        ({"prefix_cache_size": "1KiB"}, "prefix_cache_size is 1.00 KiB"),
        ({"enable_prefix_caching": False}, "enable_prefix_caching is off"),
        ({"load_format": "dummy"}, "--load-format dummy"),
    ],
)
def test_bad_input(model: str, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(model, tmp_path, **options)
