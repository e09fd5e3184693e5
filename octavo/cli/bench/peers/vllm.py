"""vLLM's build for CPUs: `LLM.generate` over all prompts as token ids, its prefix cache emptied before each run."""

import os
from importlib import import_module
from typing import Any

from octavo.cli.bench.peers import Prepare, Run, serve

_KV_CACHE_GIB = "4"
_LONGEST = 2048
_MOST_ROWS = 64


def open_engine(given: dict[str, Any]) -> tuple[Prepare, dict[str, Any]]:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: given["threads"]]))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _KV_CACHE_GIB)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    vllm: Any = import_module("vllm")

    llm = vllm.LLM(
        given["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=_LONGEST,
        max_num_seqs=_MOST_ROWS,
        enable_prefix_caching=True,
    )

    def prepare(prompts: list[list[int]], lengths: list[int]) -> Run:
        llm.reset_prefix_cache()
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            vllm.SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in lengths
        ]
        return lambda: sum(len(out.outputs[0].token_ids) for out in llm.generate(asked, params, use_tqdm=False))

    said = {name: os.environ[name] for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")}
    return prepare, {
        "engine": f"vllm {vllm.__version__}",
        "precision": "bfloat16",
        "flags": f"max_model_len {_LONGEST}, max_num_seqs {_MOST_ROWS}, prefix caching on, {said}",
    }


if __name__ == "__main__":
    serve(open_engine)
