"""What fits: weights, KV cache and working memory against the memory that there is, before anything is loaded.

Pure arithmetic on a `ModelConfig`, the sizes of its tensors and a number of free bytes; no torch, no device.
"""

import math
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from octavo.config import DTYPE_BYTES, EngineConfig, EngineOptions, ModelConfig, Precision, format_size
from octavo.errors import CapacityError, ConfigError

# Host memory for preempted requests on a GPU, if it is no more than a quarter of what is free.
GPU_SWAP_SPACE = 4 * 1024**3
# Choices for a device where the user makes none: (most sequences, most tokens) in a step. A CPU computes a token in
# about a millisecond and more, so its chunks must be short if running streams are not to stall.
STEP_SIZES = {"cpu": (64, 512), "cuda": (256, 8192)}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes, in bytes; `budget` is what Octavo may take of `free`, which are left of `total`."""

    total: int
    free: int
    budget: int
    weights: int
    working: int
    kv_cache: int
    kv_per_token: int
    block_size: int
    num_blocks: int
    max_model_len: int
    wanted_model_len: int
    share_option: str  # the flag that decides over `budget`
    swap_space: int = 0  # of host memory

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def lines(self) -> list[str]:
        """The plan for a person, one fact a line."""
        full = self.num_tokens / self.max_model_len
        lines = [
            f"memory: {self._whole()}, {format_size(self.budget)} to use: weights"
            f" {format_size(self.weights)}, working memory {format_size(self.working)},"
            f" KV cache {format_size(self.kv_cache)}",
            f"KV cache: {self.kv_per_token:,} bytes a token, {self.num_blocks:,} blocks of {self.block_size} ="
            f" {self.num_tokens:,} tokens = {full:.1f} requests of the full {self.max_model_len:,} tokens",
        ]
        if self.swap_space:
            lines.append(f"swap space: {format_size(self.swap_space)} of host memory for preempted requests")
        if self.max_model_len < self.wanted_model_len:
            lines.append(
                f"context: {self.max_model_len:,} tokens fit of the model's {self.wanted_model_len:,};"
                f" raise --kv-cache-memory or {self.share_option} for more"
            )
        return lines

    def _whole(self) -> str:
        of_total = f" of {format_size(self.total)}" if self.total != self.free else ""
        return f"{format_size(self.free)} free{of_total}"


def free_ram() -> int:
    """Bytes of RAM that can still be taken: the system's, or what the control group leaves if that is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(found[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def default_dtype(model: ModelConfig, device: str, has_bfloat16: bool) -> str:
    """On a GPU the model's own 16-bit type, on a CPU float32.

    On a CPU without kernels of its own float32 is the one type in which plain torch gives a row the same tokens alone
    and in a batch.
    """
    if device == "cpu":
        return "float32"
    return "bfloat16" if has_bfloat16 and model.dtype != "float16" else "float16"


def working_bytes(model: ModelConfig, dtype: str, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Bytes that a step of the largest size needs beside weights and cache: activations, and logits in fp32."""
    width = 6 * model.hidden_size + 3 * model.intermediate_size + 4 * model.num_heads * model.head_dim
    activations = max_num_batched_tokens * width * max(4, DTYPE_BYTES[dtype])
    return activations + 3 * max_num_seqs * model.vocab_size * 4


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device and the bytes that are free on it.

    A GPU has `total` bytes, and a share is of these, as in vLLM: what others have taken of it is theirs. Without
    `total`, as on a CPU, a share is of what is free. `host_free` are the bytes of RAM beside a GPU; on a CPU `free` is
    all there is.
    """

    device: str
    free: int
    total: int | None = None
    host_free: int = 0

    @property
    def whole(self) -> int:
        return self.free if self.total is None else self.total

    @property
    def share_name(self) -> str:
        """The option that says how much of it Octavo may take."""
        return f"{'gpu' if self.device == 'cuda' else 'cpu'}_memory_utilization"

    @property
    def share_option(self) -> str:
        return f"--{self.share_name.replace('_', '-')}"

    def budget(self, options: EngineOptions) -> int:
        """Bytes that Octavo may take."""
        return int(self.whole * getattr(options, self.share_name)) - (self.whole - self.free)

    def described(self) -> str:
        """The memory that a share is of, in words."""
        if taken := self.whole - self.free:
            return f"{format_size(self.whole)} memory, {format_size(taken)} of it taken by others,"
        return f"{format_size(self.whole)} free memory"


@dataclass(frozen=True, slots=True)
class KeptAs:
    """The types of activations, of weights and of the KV cache, which is `dtype` if it is not given."""

    dtype: str
    precision: Precision = "plain"
    kv_dtype: str = ""


def resolve(
    options: EngineOptions,
    model: ModelConfig,
    weights: int,
    memory: DeviceMemory,
    kept_as: KeptAs,
    working: int | None = None,
) -> tuple[EngineConfig, MemoryPlan]:
    """Settles every open option for a `model` of `weights` bytes; `working` is what a step takes at most, if it was
    measured.

    Raises `CapacityError` with the numbers and the option to set when weights, one request of the wanted length or the
    swap space do not fit; `ConfigError` when options contradict each other.
    """
    max_num_seqs, max_tokens = _step_sizes(options, memory.device)
    if working is None:
        working = working_bytes(model, kept_as.dtype, max_num_seqs, max_tokens)
    kv_dtype = kept_as.kv_dtype or kept_as.dtype
    per_token = model.kv_bytes_per_token(kv_dtype)
    wanted = _wanted_length(options, model)
    kv_cache = _kv_cache_bytes(options, memory, weights, working)
    # More than every sequence at full length could never be used.
    most = max_num_seqs * math.ceil(wanted / options.block_size)
    num_blocks = min(most, kv_cache // (per_token * options.block_size))
    fitting = num_blocks * options.block_size
    if fitting < wanted and (options.max_model_len or fitting < options.block_size):
        raise CapacityError(
            f"a request of {wanted} tokens needs {format_size(wanted * per_token)} of KV cache, but"
            f" {format_size(max(0, kv_cache))} are left; the largest context that fits is --max-model-len {fitting}"
            f" (or raise --kv-cache-memory or {memory.share_option})"
        )
    held = fitting * per_token
    host_free = memory.host_free if memory.device == "cuda" else memory.free - weights - working - held
    num_host_blocks = _host_blocks(options, per_token * options.block_size, memory.device, host_free)
    config = EngineConfig(
        model=model,
        options=options,
        dtype=kept_as.dtype,
        kv_dtype=kv_dtype,
        weights=kept_as.precision,
        device=memory.device,
        max_model_len=min(wanted, fitting),
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        seed=secrets.randbits(63) if options.seed is None else options.seed,
        num_host_blocks=num_host_blocks,
        warm_up=options.warm_up or "none",
    )
    plan = MemoryPlan(
        total=memory.whole,
        free=memory.free,
        budget=memory.budget(options),
        weights=weights,
        working=working,
        kv_cache=held,
        kv_per_token=per_token,
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_model_len=config.max_model_len,
        wanted_model_len=wanted,
        share_option=memory.share_option,
        swap_space=num_host_blocks * options.block_size * per_token,
    )
    return config, plan


def _step_sizes(options: EngineOptions, device: str) -> tuple[int, int]:
    """(most sequences, most tokens) in a step."""
    seqs, tokens = STEP_SIZES[device]
    max_num_seqs = options.max_num_seqs or seqs
    max_tokens = options.max_num_batched_tokens or max(tokens, max_num_seqs)
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens is {max_tokens}, below max_num_seqs {max_num_seqs}: every sequence of a step"
            " must have room for one token; raise the first or lower the second"
        )
    return max_num_seqs, max_tokens


def _wanted_length(options: EngineOptions, model: ModelConfig) -> int:
    wanted = options.max_model_len or model.max_position
    if wanted > model.max_position:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {model.max_position} tokens; lower it"
        )
    return wanted


def _kv_cache_bytes(options: EngineOptions, memory: DeviceMemory, weights: int, working: int) -> int:
    """Bytes for the KV cache: those that were asked for, or what weights and a step leave."""
    budget = memory.budget(options)
    if weights + working > (memory.free if options.kv_cache_memory else budget):
        raise CapacityError(
            f"weights need {format_size(weights)} and a step {format_size(working)}, but of"
            f" {memory.described()} only {format_size(max(0, budget))} may be used"
            f" ({memory.share_option} {getattr(options, memory.share_name)}); use a smaller or quantized model, or free"
            " memory"
        )
    kv_cache = options.kv_cache_memory or budget - weights - working
    if options.kv_cache_memory and weights + working + kv_cache > memory.free:
        raise CapacityError(
            f"kv_cache_memory is {format_size(kv_cache)}, but beside the weights only"
            f" {format_size(memory.free - weights - working)} are free; set --kv-cache-memory lower"
        )
    return kv_cache


def _host_blocks(options: EngineOptions, block_bytes: int, device: str, host_free: int) -> int:
    """Blocks of the swap space, which must fit into `host_free` bytes."""
    space = options.swap_space
    if space is None:
        space = min(GPU_SWAP_SPACE, host_free // 4) if device == "cuda" else 0
    elif space > host_free:
        raise CapacityError(
            f"swap_space is {format_size(space)}, but of the RAM only {format_size(max(0, host_free))} are left; set"
            " --swap-space lower, 0 for none"
        )
    if options.preemption_mode == "swap" and space < block_bytes:
        raise ConfigError(
            f"preemption_mode is swap, but swap_space is {format_size(space)} and one block {format_size(block_bytes)};"
            " set --swap-space to more, or --preemption-mode auto"
        )
    return 0 if options.preemption_mode == "recompute" else space // block_bytes
