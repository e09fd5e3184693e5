"""CTranslate2: `Generator.generate_batch` over all prompts, greedy, from a folder that its converter has made.

It has one length for a whole batch, so rows that ask for less are computed to the end all the same; what they asked for
is what counts. Where all prompts begin alike, the beginning is its `static_prompt`, which is computed once a call.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from octavo.cli.bench.peers import Prepare, Run, UnusableError, common_prefix, serve

_WORTH_SHARING = 64  # tokens that prompts begin with alike
_MOST_ROWS = 64


def open_engine(given: dict[str, Any]) -> tuple[Prepare, dict[str, Any]]:
    ctranslate2: Any = import_module("ctranslate2")

    folder = Path(given["model"])
    if not (folder / "model.bin").is_file():
        raise UnusableError(
            f"{folder} is no folder of CTranslate2's; make one with ct2-transformers-converter --model FOLDER"
            " --output_dir FOLDER, and name it with --peer-model"
        )
    words: list[str] = json.loads((folder / "vocabulary.json").read_text())
    precision = given.get("precision") or "int8"
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=precision, intra_threads=given["threads"], inter_threads=1
    )

    def prepare(prompts: list[list[int]], lengths: list[int]) -> Run:
        shared = common_prefix(prompts)
        shared = shared if shared >= _WORTH_SHARING else 0
        beginning = [words[token] for token in prompts[0][:shared]]
        own = [[words[token] for token in prompt[shared:]] for prompt in prompts]
        most = max(lengths)

        def run() -> int:
            answers = generator.generate_batch(
                own,
                max_batch_size=_MOST_ROWS,
                static_prompt=beginning or None,
                cache_static_prompt=False,
                include_prompt_in_result=False,
                max_length=most,
                min_length=most,
                sampling_topk=1,
                end_token=[],
            )
            whole = zip(answers, lengths, strict=True)
            return sum(min(length, len(answer.sequences_ids[0])) for answer, length in whole)

        return run

    return prepare, {
        "engine": f"ctranslate2 {ctranslate2.__version__}",
        "precision": generator.compute_type,
        "flags": f"inter_threads 1, intra_threads {given['threads']}, max_batch_size {_MOST_ROWS}",
    }


if __name__ == "__main__":
    serve(open_engine)
