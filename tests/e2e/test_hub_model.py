"""A model of a hub, from its name to its tokens: fetched once, then found."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo import LLM, SamplingParams
from tests.checkpoint.fake_hubs import FakeHub, serving
from tests.tiny_models import save_llama


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_a_name_is_enough(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_llama(tmp_path / "tiny")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    wanted = LLM(str(folder), device="cpu").generate("w5 w6", params, use_tqdm=False)[0].outputs[0].token_ids
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    with serving(FakeHub("octo/tiny", files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
        LLM("octo/tiny", hub=hub, device="cpu")
    llm = LLM("octo/tiny", hub=hub, device="cpu")
    assert llm.generate("w5 w6", params, use_tqdm=False)[0].outputs[0].token_ids == wanted
