"""llama.cpp by way of llama-cpp-python's C interface: all prompts as sequences of one continuous batch, greedy.

Each sequence has a stream of its own (`kv_unified` off), which its makers advise for sequences that share nothing.
"""

from typing import Any

from octavo.cli.bench.peers import Run, serve

_BATCH = 2048
_MICRO_BATCH = 512


def open_engine(given: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import ctypes

    import llama_cpp  # type: ignore[import-not-found]
    import numpy as np

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(given["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {given['model']}")
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def context_for(prompts: list[list[int]], lengths: list[int]) -> Any:
        longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = (longest // 256 + 1) * 256 * len(prompts)
        params.n_batch, params.n_ubatch = _BATCH, _MICRO_BATCH
        params.n_seq_max = len(prompts)
        params.n_threads = params.n_threads_batch = given["threads"]
        params.kv_unified = False
        return llama_cpp.llama_init_from_model(model, params)

    def decode(context: Any, entries: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Computes (token, position, sequence, whether to draw); the tokens drawn, by sequence."""
        for i, (token, position, sequence, draws) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = draws
        batch.n_tokens = len(entries)
        code = llama_cpp.llama_decode(context, batch)
        assert code == 0, f"llama_decode gave {code}"
        drawn = {}
        for i, (_, _, sequence, draws) in enumerate(entries):
            if draws:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(width,))
                drawn[sequence] = int(logits.argmax())
        return drawn

    # The library calls `quiet` for as long as it lives, so it must live as long as `run`.
    def run(prompts: list[list[int]], lengths: list[int], _kept: Any = quiet) -> int:
        context = context_for(prompts, lengths)
        left = dict(enumerate(lengths))
        places = [len(prompt) for prompt in prompts]
        generated = 0
        entries = [
            (token, place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
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
                    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), sequence, -1, -1)
        llama_cpp.llama_free(context)
        return generated

    name = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model, name, len(name))
    return run, {
        "engine": f"llama-cpp-python {llama_cpp.__version__}",
        "precision": name.value.decode().split(maxsplit=2)[-1],  # such as Q4_0, behind the architecture and size
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }


if __name__ == "__main__":
    serve(open_engine)
