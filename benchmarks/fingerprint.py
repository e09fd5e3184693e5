"""Fingerprints of what the engine computes: for a fixed set of models, precisions and requests, hashes of tokens and of
log probabilities, and some of their values. What is bit-identical prints the same lines.

    python benchmarks/fingerprint.py                            each build of the CPU's kernels that this machine runs
    python benchmarks/fingerprint.py --device cuda
    python benchmarks/fingerprint.py --package ../other         another checkout's package, such as an older commit's
    python benchmarks/fingerprint.py --compare before.txt after.txt [--within 2e-6]

The models are made here, by numpy from seeds, so that they are the same everywhere. They have 96 tokens, and log
probabilities of all of them are asked for: that is the logits but for a constant. Uses nothing of Octavo but `LLM` and
`SamplingParams`, and `library.load` to choose a build, which older packages have as well.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 96
WIDTH, MLP, HEADS, KV_HEADS, HEAD, LAYERS = 128, 256, 4, 2, 32, 3
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen": {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "kv_channels": HEAD,
        "intermediate_size": 2 * MLP,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 64,
        "max_position_embeddings": 512,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "bf16": False,
        "fp16": False,
        "fp32": True,
        "vocab_size": 512,
    },
}


# ---- models -------------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> None:
    for seed, (family, config) in enumerate(FAMILIES.items()):
        path = folder / family
        path.mkdir()
        whole = config if family == "qwen" else CONFIG | config
        (path / "config.json").write_text(json.dumps(whole))
        _write_tensors(path / "model.safetensors", dict(_tensors(family, whole, np.random.default_rng(seed))))
        if family == "qwen":
            _write_ranks(path / "qwen.tiktoken")
        else:
            _write_tokenizer(path / "tokenizer.json")


def _tensors(family: str, config: dict[str, Any], random: np.random.Generator) -> Iterator[tuple[str, Any]]:
    def matrix(outputs: int, inputs: int) -> Any:
        return (random.standard_normal((outputs, inputs)) * 1.5 * inputs**-0.5).astype(np.float32)

    def vector(size: int, middle: float) -> Any:
        return (middle + 0.3 * random.standard_normal(size)).astype(np.float32)

    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    if family == "qwen":
        yield "transformer.wte.weight", matrix(512, WIDTH) * 8
        for i in range(LAYERS):
            layer = f"transformer.h.{i}"
            yield f"{layer}.attn.c_attn.weight", matrix(3 * q, WIDTH)
            yield f"{layer}.attn.c_attn.bias", vector(3 * q, 0)
            yield f"{layer}.attn.c_proj.weight", matrix(WIDTH, q)
            yield f"{layer}.mlp.w1.weight", matrix(MLP, WIDTH)
            yield f"{layer}.mlp.w2.weight", matrix(MLP, WIDTH)
            yield f"{layer}.mlp.c_proj.weight", matrix(WIDTH, MLP)
            yield f"{layer}.ln_1.weight", vector(WIDTH, 1)
            yield f"{layer}.ln_2.weight", vector(WIDTH, 1)
        yield "transformer.ln_f.weight", vector(WIDTH, 1)
        yield "lm_head.weight", matrix(512, WIDTH)
        return
    yield "model.embed_tokens.weight", matrix(VOCABULARY, WIDTH) * (2 if config["tie_word_embeddings"] else 8)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, outputs in (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", matrix(outputs, WIDTH)
            if family == "qwen2":
                yield f"{layer}.self_attn.{name}_proj.bias", vector(outputs, 0)
        yield f"{layer}.self_attn.o_proj.weight", matrix(WIDTH, q)
        if family == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", vector(HEAD, 1)
            yield f"{layer}.self_attn.k_norm.weight", vector(HEAD, 1)
        yield f"{layer}.mlp.gate_proj.weight", matrix(MLP, WIDTH)
        yield f"{layer}.mlp.up_proj.weight", matrix(MLP, WIDTH)
        yield f"{layer}.mlp.down_proj.weight", matrix(WIDTH, MLP)
        yield f"{layer}.input_layernorm.weight", vector(WIDTH, 1)
        yield f"{layer}.post_attention_layernorm.weight", vector(WIDTH, 1)
    yield "model.norm.weight", vector(WIDTH, 1)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", matrix(VOCABULARY, WIDTH)


def _write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    header, position = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [position, position + tensor.nbytes]}
        position += tensor.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def _write_tokenizer(path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    whole = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    path.write_text(json.dumps(whole | {"post_processor": None, "decoder": None, "model": model}))


def _write_ranks(path: Path) -> None:
    """All bytes, and as many pairs as leave room for Qwen v1's 208 special tokens."""
    from base64 import b64encode

    tokens = [bytes([byte]) for byte in range(256)] + [bytes([97 + i // 6, 97 + i % 6]) for i in range(36)]
    path.write_text("".join(f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


# ---- what is asked ------------------------------------------------------------------------------------------------


def prompts(family: str) -> list[list[int]]:
    """Of 1 to 200 tokens, two of them with a long prefix in common."""
    random = np.random.default_rng(7)
    high = 292 if family == "qwen" else VOCABULARY
    made = [random.integers(3, high, length).tolist() for length in (1, 5, 16, 37, 64, 130, 200)]
    prefix = random.integers(3, high, 80).tolist()
    return [*made, [*prefix, 5, 6], [*prefix, 7]]


def requests() -> dict[str, list[dict[str, Any]]]:
    """Sampling parameters by name, for each prompt in turn."""
    every = {"max_tokens": 24, "ignore_eos": True, "logprobs": VOCABULARY}
    sampled = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 2},
        {"temperature": 1.3, "min_p": 0.05, "seed": 3},
    ]
    changed = [
        {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.9, "seed": 4, "logit_bias": {5: 4.0, 9: -6.0}, "frequency_penalty": 0.5},
        {"temperature": 0.8, "seed": 5, "allowed_token_ids": list(range(10, 60)), "top_p": 0.95},
        {"temperature": 1.0, "seed": 6, "min_tokens": 20, "stop_token_ids": list(range(3, 40)), "ignore_eos": False},
    ]
    return {
        "greedy": [every | {"temperature": 0.0}],
        "sampled": [every | each for each in sampled],
        "plain": [{"max_tokens": 24, "ignore_eos": True, "seed": 8}],  # nothing to tell but tokens
        "changed": [every | each for each in changed],
        "samples": [every | {"n": 3, "temperature": 1.0, "seed": 9}],
        "beams": [{"max_tokens": 12, "temperature": 0.0, "beam_width": 3, "logprobs": 5, "ignore_eos": True}],
        "prompt": [{"max_tokens": 2, "temperature": 0.0, "prompt_logprobs": VOCABULARY, "ignore_eos": True}],
    }


def engines(device: str) -> dict[str, dict[str, Any]]:
    """Options of the engine by name."""
    small = {"kv_cache_memory": 64 << 20, "max_model_len": 512, "device": device}
    chunked = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    dtypes = ("float32", "bfloat16", "float16")
    made: dict[str, dict[str, Any]] = {dtype: small | {"dtype": dtype} for dtype in dtypes}
    made |= {f"{dtype} chunked": small | chunked | {"dtype": dtype} for dtype in dtypes[:2]}
    if device == "cuda":
        made["fp8"] = small | {"dtype": "bfloat16", "quantize": "fp8"}
        made["kv fp8"] = small | {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
        made["deterministic"] = small | chunked | {"dtype": "bfloat16", "deterministic": True}
    else:
        made |= {name: small | {"dtype": "bfloat16", "quantize": name} for name in ("int8", "int4")}
        made["kv int8"] = small | {"dtype": "bfloat16", "kv_cache_dtype": "int8"}
        made["int4 chunked, kv int8"] = made["int4"] | chunked | {"kv_cache_dtype": "int8"}
    for mode in ("recompute", "swap"):
        tight = {"preemption_mode": mode, "swap_space": 64 << 20, "kv_cache_memory": TIGHT, "block_size": 16}
        made[f"preempted, {mode}"] = small | tight | {"dtype": "float32", "max_model_len": 256}
    return made


# Of float32 and three layers: about 20 blocks of 16 tokens, where the prompts alone have 40.
TIGHT = 20 * 16 * 2 * LAYERS * KV_HEADS * HEAD * 4
PREEMPTED = ("llama", "mistral")


def worker(folder: Path, device: str, build: str | None) -> None:
    """Prints a line for each model, engine and kind of request."""
    if build is not None:
        from octavo.kernels import library

        load = library.load
        library.load = lambda name=None: load(build if build != "none" else "no such build")
    for family in FAMILIES:
        for name, options in engines(device).items():
            if not name.startswith("preempted") or family in PREEMPTED:
                _fingerprint(folder / family, family, name, options)


def _fingerprint(path: Path, family: str, name: str, options: dict[str, Any]) -> None:
    from octavo import LLM, SamplingParams

    where = f"{family} / {name}"
    try:
        llm = LLM(str(path), **options)
    except Exception as error:
        print(f"{where} / - refused: {type(error).__name__}", flush=True)
        return
    for kind, parameters in requests().items():
        for turn in ("", " again"):  # the second time from the prefix cache
            asked = prompts(family)
            if name.startswith("preempted"):
                # Answers may be long and are not: more begin than can go on.
                asked = [prompt[:20] for prompt in asked for _ in range(2)]
                parameters = [
                    each | {"max_tokens": 150 // each.get("n", each.get("beam_width", 1))} for each in parameters
                ]
                parameters = [each | {"ignore_eos": False} for each in parameters]
            params = [SamplingParams(**parameters[i % len(parameters)]) for i in range(len(asked))]
            answers = llm.generate(asked, params, use_tqdm=False)
            print(f"{where} / {kind}{turn}: {_said(answers)}", flush=True)
    llm.shutdown()


def _said(answers: list[Any]) -> str:
    tokens, values = [], []
    for answer in answers:
        for entry in answer.prompt_logprobs or []:
            values += _values(entry)
        for output in answer.outputs:
            tokens.append(output.token_ids)
            for entry in output.logprobs or []:
                values += _values(entry)
            values += [value for value in (output.cumulative_logprob, output.beam_score) if value is not None]
    numbers = np.array(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    said = f"tokens {_hash(json.dumps(tokens).encode())}"
    if len(finite):
        some = finite[:: max(1, len(finite) // 4)][:4]
        said += f" logprobs {_hash(numbers.tobytes())} mean {finite.mean():.7f}"
        said += f" some {' '.join(f'{value:.6f}' for value in some)}"
    return said


def _values(entry: dict[int, Any] | None) -> list[float]:
    return [] if entry is None else [entry[token].logprob for token in sorted(entry)]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


# ---- two runs -----------------------------------------------------------------------------------------------------


def compare(before: Path, after: Path, within: float) -> int:
    """Says which lines differ; 0 if none does by more than `within`."""
    one, other = _lines(before), _lines(after)
    missing = sorted(one.keys() ^ other.keys())
    differing = []
    for key in one.keys() & other.keys():
        mine, its = one[key].split(), other[key].split()
        if mine == its:
            continue
        numbers = [[float(word) for word in line[5:] if word != "some"] for line in (mine, its)]
        same = mine[:2] == its[:2] and len(mine) == len(its) and len(mine) > 4 and within > 0
        if not same or max(abs(a - b) / max(1, abs(a)) for a, b in zip(*numbers, strict=True)) > within:
            differing.append(key)
    for key in sorted(differing):
        print(f"- {key}: {one[key]}\n+ {key}: {other[key]}")
    for key in missing:
        print(f"only in {before if key in one else after}: {key}")
    print(f"{len(one.keys() & other.keys())} lines in both, {len(differing)} differ, {len(missing)} are in one alone")
    return 1 if differing or missing else 0


def _lines(path: Path) -> dict[str, str]:
    """The line of each case, by build and case."""
    found, build = {}, ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# "):
            build = line[2:]
        elif ": " in line and " / " in line:
            key, _, said = line.partition(": ")
            found[f"{build}: {key}"] = said
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="fingerprint")
    parser.add_argument("--package", metavar="FOLDER", help="checkout whose package is run (default: this one)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--builds", metavar="NAMES", help="builds of the CPU's kernels, with commas between; none: torch"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="two outputs of this script")
    parser.add_argument(
        "--within",
        type=float,
        default=0.0,
        metavar="X",
        help="difference of log probabilities, relative above 1, that is none",
    )
    parser.add_argument("--worker", nargs=2, metavar="X", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare, arguments.within)
    if arguments.worker:
        folder, build = arguments.worker
        worker(Path(folder), arguments.device, build or None)
        return 0
    package = Path(arguments.package or Path(__file__).parent.parent).resolve()
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "2"}
    program = "from octavo.kernels import library; print(*library.builds(), 'none', sep=',')"
    command = [sys.executable, "-c", program]
    names = [""]
    if arguments.device == "cpu":
        said = arguments.builds or subprocess.check_output(command, env=environment, text=True, cwd=package).strip()
        names = said.split(",")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for name in names:
            print(f"# {name or arguments.device}", flush=True)
            command = [sys.executable, __file__, "--device", arguments.device, "--worker", folder, name]
            subprocess.run(command, env=environment, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
