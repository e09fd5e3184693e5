"""Octavo beside `transformers` on the same weights: how far logits differ, and whether greedy tokens are equal.

Both compute in fp32 on one device. A folder is loaded by transformers itself; a GGUF file's tensors are dequantized
here and given to transformers' model, so that the arithmetic is compared and not the rounding. Prints nothing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from octavo.batch import Batch
from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.config import EngineOptions, ModelConfig
from octavo.engine.engine import Engine
from octavo.errors import ConfigError, RequestError
from octavo.models import check_runnable, read_config
from octavo.models.loader import CheckpointTensors
from octavo.request import Request
from octavo.runner.cpu import KernelRunner
from octavo.runner.executor import CudaExecutor, LocalExecutor
from octavo.runner.model_runner import ModelRunner
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.runner.cuda_runner import CudaRunner

# Positions whose logits are alive at once, on either side.
_CHUNK = 256

# Times what a random walk of roundings comes to. The largest difference seen is 1.0 times that: tiny models of every
# family, each build of the CPU's kernels and plain torch. It is 0.16 times for a real one of 30 layers.
_MARGIN = 4.0

Runner: TypeAlias = "ModelRunner | KernelRunner | CudaRunner"


@dataclass(frozen=True, slots=True)
class PromptParity:
    """One prompt's comparison.

    `max_difference` is over all logits of the prompt, `tolerance` what rounding to fp32 explains of it.
    `first_difference` is the index of the first answer token at which transformers, given the same beginning, would
    have gone on with `their_token` instead of `our_token`; its logit leads ours there by `lead`. None if all tokens are
    equal.
    """

    name: str
    num_prompt: int
    num_answer: int
    max_difference: float
    tolerance: float
    first_difference: int | None = None
    our_token: str = ""
    their_token: str = ""
    lead: float = 0.0


def compare(options: EngineOptions, prompts: Mapping[str, str], max_tokens: int) -> Iterator[PromptParity]:
    """Compares prompt by prompt, each answered with `max_tokens` tokens; longer prompts are cut to the context.

    Raises `ConfigError` where there is nothing to compare with, and what `LLM` raises.
    """
    checkpoint = open_checkpoint(options.model, hub=options.hub, revision=options.revision, check=check_runnable)
    reference = load_reference(checkpoint, options.device)
    engine = Engine.build(options)
    executor = engine.executor
    assert isinstance(executor, LocalExecutor | CudaExecutor), "parity runs in one process"
    tokenizer = Tokenizer.load(options.tokenizer or options.model, hub=options.hub, revision=options.revision)
    room = engine.config.max_model_len - max_tokens
    if room < 1:
        raise RequestError(
            f"max_tokens is {max_tokens}, but the context has {engine.config.max_model_len}", "max_tokens"
        )
    ids = {name: tokenizer.encode(text)[:room] for name, text in prompts.items()}
    answers = _answer(engine, ids, max_tokens)
    for name, tokens in ids.items():
        yield _compare(name, tokens, answers[name], executor.runner, reference, tokenizer)


def load_reference(checkpoint: Checkpoint, device: str) -> Any:
    """transformers' model of the checkpoint in fp32; `ConfigError` if transformers has no such model."""
    try:
        transformers = import_module("transformers")
    except ImportError:
        raise ConfigError(
            "parity compares with the package transformers, which is not installed; run: pip install transformers"
        ) from None
    architecture = read_config(checkpoint.config).architecture
    if not hasattr(transformers, architecture):
        raise ConfigError(
            f"architecture {architecture} is not in transformers {transformers.__version__}, so there is nothing to"
            " compare with; Octavo's own tests compare it with a reference of its own"
        )
    if checkpoint.path.is_dir():
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    else:
        model = _from_tensors(transformers, checkpoint)
    return model.to("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")).eval()


def _from_tensors(transformers: Any, checkpoint: Checkpoint) -> Any:
    """transformers' model of our reading of the configuration, with our dequantized tensors."""
    config = dict(checkpoint.config)
    factors = None
    if (config.get("rope_scaling") or {}).get("rope_type") == "freq_factors":
        # llama.cpp's form of Llama 3's rule, which transformers cannot be told.
        factors = torch.tensor(config.pop("rope_scaling")["factors"])
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32
    )
    source = CheckpointTensors(checkpoint, torch.float32, torch.device("cpu"))
    tensors = {name: source.tensor(name, info.shape) for name, info in checkpoint.tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    assert not unexpected, f"transformers has no place for {unexpected}"
    assert set(missing) <= tied, f"transformers also wants {missing}"
    if factors is not None:
        model.model.rotary_emb.inv_freq /= factors
    return model


def _answer(engine: Engine, prompts: Mapping[str, list[int]], max_tokens: int) -> dict[str, list[int]]:
    """Greedy answers by the engine, all prompts together."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    for name, tokens in prompts.items():
        engine.add(Request(name, tokens, params))
    while engine.has_work():
        for request_id, _, token, *_ in engine.step().tokens:
            answers[request_id].append(token)
    return answers


def rounding(terms: int, size: float) -> float:
    """How far two fp32 sums of the same `terms` numbers may lie apart if they add in different orders.

    Each addition rounds by at most 2**-24 of `size`, the largest value that such a sum has. Signs are as good as
    random, so n roundings come to sqrt(n) of one and not to n; there is a margin on that. Builds and processors differ
    in their orders.
    """
    return _MARGIN * math.sqrt(terms) * 2.0**-24 * size


def terms_of_a_logit(model: ModelConfig, context: int) -> int:
    """Additions that a logit has come through, one after the other, at the end of `context` tokens."""
    norms, products = 2 * model.hidden_size, 2 * model.hidden_size + model.num_heads * model.head_dim
    layer = norms + products + model.intermediate_size + model.head_dim + context
    return model.num_layers * layer + 2 * model.hidden_size


@torch.inference_mode()
def _compare(
    name: str,
    prompt: list[int],
    answer: list[int],
    runner: Runner,
    reference: Any,
    tokenizer: Tokenizer,
) -> PromptParity:
    tokens = torch.tensor([prompt + answer[:-1]], device=reference.device)
    hidden_TD = reference.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
    difference = largest = 0.0
    for start, ours_TV in _prompt_logits(runner, prompt):
        theirs_TV = reference.lm_head(hidden_TD[start : start + len(ours_TV)])
        difference = float(np.maximum(difference, float((ours_TV - theirs_TV).abs().max())))  # NaN stays NaN
        largest = max(largest, float(theirs_TV.abs().max()))
    tolerance = rounding(terms_of_a_logit(runner.model.config, len(prompt)), largest)
    # A greedy answer is one whose every token is the likeliest after what stands before it.
    theirs_AV = reference.lm_head(hidden_TD[len(prompt) - 1 :])
    for i, (ours, theirs) in enumerate(zip(answer, theirs_AV.argmax(-1).tolist(), strict=True)):
        if ours != theirs:
            lead = float(theirs_AV[i, theirs] - theirs_AV[i, ours])
            texts = tokenizer.token_text(ours), tokenizer.token_text(theirs)
            return PromptParity(name, len(prompt), len(answer), difference, tolerance, i, *texts, lead)
    return PromptParity(name, len(prompt), len(answer), difference, tolerance)


def _prompt_logits(runner: Runner, prompt: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """(first position, logits) of a prompt that is computed alone, chunk by chunk, in the cache's first blocks."""
    block_size = runner.kv_cache.layers[0].k_PBKH.shape[1]
    blocks = np.arange(-(-len(prompt) // block_size), dtype=np.int32)[None]
    alpha = np.array([runner.model.config.rope.ntk_alpha(len(prompt))], np.float32)
    for start in range(0, len(prompt), _CHUNK):
        token_ids = np.array(prompt[start : start + _CHUNK], np.int32)
        first, counts = np.array([start], np.int32), np.array([len(token_ids)], np.int32)
        batch = Batch.of_rows(token_ids, first, blocks, block_size, counts, {"ntk_alpha": alpha})
        forward: Any = runner.forward
        yield start, torch.as_tensor(forward.logits(forward.hidden(batch)))
