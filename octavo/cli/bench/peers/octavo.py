"""Octavo itself, driven as its users drive it: `LLM.generate` over all prompts."""

import os
from typing import Any

from octavo.cli.bench.peers import Prepare, Run, serve


def open_engine(given: dict[str, Any]) -> tuple[Prepare, dict[str, Any]]:
    os.environ["OMP_NUM_THREADS"] = str(given["threads"])
    from octavo import LLM, SamplingParams, __version__
    from octavo.config import EngineOptions

    llm = LLM.from_options(EngineOptions(**given["options"]))
    config = llm.engine.config

    def prepare(prompts: list[list[int]], lengths: list[int]) -> Run:
        llm.engine.scheduler.blocks.reset_prefix_cache()
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        return lambda: sum(len(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False))

    precision = config.weights if config.weights != "plain" else config.dtype
    return prepare, {"engine": f"octavo {__version__}", "precision": precision, "kv_cache": config.kv_dtype}


if __name__ == "__main__":
    serve(open_engine)
