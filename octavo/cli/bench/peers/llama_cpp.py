"""llama.cpp by way of llama-cpp-python's C interface: all prompts as sequences of one continuous batch, greedy.

Each sequence has a stream of its own (`kv_unified` off), which its makers advise for sequences that share nothing.
Where all prompts begin alike, the beginning is computed once and copied to the others (`llama_memory_seq_cp`).
"""

from typing import Any

from octavo.cli.bench.peers import Prepare, Run, UnusableError, common_prefix, serve

_BATCH = 2048
_MICRO_BATCH = 512
_WORTH_SHARING = 64  # tokens that prompts begin with alike

Entry = tuple[int, int, int, bool]  # token, position, sequence, whether to draw


def open_engine(given: dict[str, Any]) -> tuple[Prepare, dict[str, Any]]:
    import ctypes

    import llama_cpp  # type: ignore[import-not-found]
    import numpy as np

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(given["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise UnusableError(f"llama.cpp cannot load {given['model']}; name a GGUF file with --peer-model")
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
    contexts: list[Any] = []

    def context_for(prompts: list[list[int]], lengths: list[int]) -> Any:
        while contexts:
            llama_cpp.llama_free(contexts.pop())
        longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = (longest // 256 + 1) * 256 * len(prompts)
        params.n_batch, params.n_ubatch = _BATCH, _MICRO_BATCH
        params.n_seq_max = len(prompts)
        params.n_threads = params.n_threads_batch = given["threads"]
        params.kv_unified = False
        contexts.append(llama_cpp.llama_init_from_model(model, params))
        return contexts[0]

    def decode(context: Any, entries: list[Entry]) -> dict[int, int]:
        """Computes the entries; the tokens drawn, by sequence."""
        for i, (token, position, sequence, draws) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = draws
        batch.n_tokens = len(entries)
        code = llama_cpp.llama_decode(context, batch)
        assert code == 0, f"llama_decode gave {code}"
        drawing = [sequence for _, _, sequence, draws in entries if draws]
        if not drawing:
            return {}
        # The rows that draw lie one behind the other.
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(drawing), width))
        return dict(zip(drawing, logits.argmax(axis=1).tolist(), strict=True))

    # The library calls `quiet` for as long as it lives, so it must live as long as `prepare`.
    def prepare(prompts: list[list[int]], lengths: list[int], _kept: Any = quiet) -> Run:
        context = context_for(prompts, lengths)
        return lambda: generate(context, prompts, lengths)

    def generate(context: Any, prompts: list[list[int]], lengths: list[int]) -> int:
        memory = llama_cpp.llama_get_memory(context)
        left = dict(enumerate(lengths))
        places = [len(prompt) for prompt in prompts]
        generated = 0
        shared = common_prefix(prompts)
        shared = shared if shared >= _WORTH_SHARING else 0
        if shared:
            for start in range(0, shared, _BATCH):
                part = prompts[0][start : min(shared, start + _BATCH)]
                decode(context, [(token, start + i, 0, False) for i, token in enumerate(part)])
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        entries = [
            (prompt[place], place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place in range(shared, len(prompt))
        ]
        while entries:
            drawn: dict[int, int] = {}
            for start in range(0, len(entries), _BATCH):
                drawn |= decode(context, entries[start : start + _BATCH])
            generated += len(drawn)
            entries = []
            for sequence, token in drawn.items():
                left[sequence] -= 1
                if left[sequence]:
                    entries.append((token, places[sequence], sequence, True))
                    places[sequence] += 1
                else:
                    llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        return generated

    name = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model, name, len(name))
    return prepare, {
        "engine": f"llama-cpp-python {llama_cpp.__version__}",
        "precision": name.value.decode().split(maxsplit=2)[-1],  # such as Q4_0, behind the architecture and size
        "flags": f"n_batch {_BATCH}, n_ubatch {_MICRO_BATCH}, kv_unified off",
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }


if __name__ == "__main__":
    serve(open_engine)
