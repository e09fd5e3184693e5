"""What each precision costs in quality: perplexity of a model on a text that comes with Python, against float32.

`scripts/bench perplexity benchmarks/perplexity.py [--model M] [--chunks N] [--only P,P] [--logs FOLDER]`. The text is
that of `help()`, `pydoc_data.topics`, joined by newlines; chunks of 512 tokens, each from its first token on without
what was before. Knows nothing of speed: a machine that is busy gives the same numbers.
"""

import argparse
import gc
import hashlib
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

from octavo import LLM, SamplingParams
from octavo.cli.bench import print_json, print_table
from octavo.kernels import library

CHUNK = 512
# Options of each precision; `stored` is a quantized file's own.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "stored": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
PRECISIONS |= {f"{name}-kv8": options | {"kv_cache_dtype": "int8"} for name, options in PRECISIONS.items()}
ON_A_GPU: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    # In steps of many rows these are rounded to fp8 as well; in steps of few, as in decoding, they are not.
    "fp8": {"dtype": "bfloat16", "quantize": "fp8"},
    "fp8-few": {"dtype": "bfloat16", "quantize": "fp8", "max_num_batched_tokens": 32, "max_num_seqs": 32},
    "fp8-kv": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "fp8-both": {"dtype": "bfloat16", "quantize": "fp8", "kv_cache_dtype": "fp8"},
}


def log_likelihoods(model: str | None, options: dict[str, Any], chunks: int) -> tuple[np.ndarray, str, str]:
    """Natural logarithms of the probabilities of the text's tokens, but each chunk's first; types of weights and KV."""
    options = {"max_num_batched_tokens": CHUNK} | options
    llm = LLM(model, max_model_len=CHUNK + 16, enable_prefix_caching=False, **options)
    token_ids = llm.tokenizer.encode("\n".join(topics.values()))[: chunks * CHUNK]
    prompts = [token_ids[i : i + CHUNK] for i in range(0, len(token_ids), CHUNK)]
    found = []
    work = ((prompt, SamplingParams(max_tokens=1, prompt_logprobs=0)) for prompt in prompts)
    for index, output in llm.generate_iter(work, max_open=4):
        entries = output.prompt_logprobs
        pairs = zip(prompts[index][1:], entries[1:], strict=True)
        found.append((index, [entry[token].logprob for token, entry in pairs]))
    config = llm.engine.config
    return np.concatenate([part for _, part in sorted(found)]), config.weights, config.kv_dtype


def kept(folder: Path | None, name: str, compute: Callable[[], tuple[np.ndarray, str, str]]) -> Any:
    """What `compute` gives, kept in a file of the folder, so that a table can be made in several runs."""
    path = folder and folder / f"{name}.npz"
    if path and path.exists():
        stored = np.load(path)
        return stored["logs"], str(stored["weights"]), str(stored["kv"])
    logs, weights, kv = compute()
    if path:
        np.savez(path, logs=logs, weights=weights, kv=kv)
    return logs, weights, kv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--chunks", type=int, default=128)
    precisions = ON_A_GPU if torch.cuda.is_available() else PRECISIONS
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(precisions))
    parser.add_argument(
        "--logs", type=Path, help="folder to keep what was computed in, for a later run of the same model"
    )
    asked = parser.parse_args()
    text = "\n".join(topics.values())
    kernels = library.load()
    print(
        f"text:    pydoc_data.topics of Python {platform.python_version()}, {len(text):,} characters, sha256 "
        f"{hashlib.sha256(text.encode()).hexdigest()[:16]}; its first {asked.chunks * CHUNK:,} tokens, by {CHUNK}"
    )
    gpu = torch.cuda.is_available() and f"Triton on {torch.cuda.get_device_name()}"
    print(f"kernels: {gpu or (kernels.name if kernels else 'none, plain torch')}\n", flush=True)
    rows: list[dict[str, Any]] = []
    base: np.ndarray | None = None
    for precision in asked.only:
        options = precisions[precision]
        logs, weights, kv = kept(
            asked.logs,
            f"{precision}-{asked.chunks}",
            lambda options=options: log_likelihoods(asked.model, options, asked.chunks),
        )
        base = logs if base is None else base
        worse = base - logs
        rows.append(
            {
                "precision": precision,
                "weights": weights,
                "kv": kv,
                "tokens": len(logs),
                "perplexity": round(math.exp(-logs.mean()), 4),
                "percent_above_first": round(100 * math.expm1(worse.mean()), 3),
                "standard_error": round(100 * float(worse.std()) / math.sqrt(len(worse)), 3),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        gc.collect()
    print_table([row | {"perplexity": f"{row['perplexity']:.3f}"} for row in rows])
    print_json({"benchmark": "perplexity", "model": asked.model or "default", "rows": rows})


if __name__ == "__main__":
    main()
