"""transformers: `generate` over all prompts as one padded batch, in bf16."""

from typing import Any

from octavo.cli.bench.peers import Prepare, Run, serve


def open_engine(given: dict[str, Any]) -> tuple[Prepare, dict[str, Any]]:
    from importlib import import_module

    import torch

    transformers: Any = import_module("transformers")  # its types change too often to be leaned on

    torch.set_num_threads(given["threads"])
    where = {}
    if given["model"].endswith(".gguf"):
        folder, _, given["model"] = given["model"].rpartition("/")
        where = {"pretrained_model_name_or_path": folder, "gguf_file": given["model"]}
    else:
        where = {"pretrained_model_name_or_path": given["model"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    model.eval()

    def prepare(prompts: list[list[int]], lengths: list[int]) -> Run:
        longest, most = max(map(len, prompts)), max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1

        @torch.inference_mode()
        def run() -> int:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=most,
                max_new_tokens=most,
                pad_token_id=0,
            )
            # Rows that asked for less were computed to the end all the same; what they asked for is what counts.
            return sum(lengths)

        return run

    return prepare, {"engine": f"transformers {transformers.__version__}", "precision": "bfloat16"}


if __name__ == "__main__":
    serve(open_engine)
