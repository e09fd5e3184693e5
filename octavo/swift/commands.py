"""`infer_main` and `deploy_main`: what `octavo infer` and `octavo deploy` do, from flags to an exit code."""

import sys
from pathlib import Path
from typing import Any

from octavo.config import ServerOptions
from octavo.errors import ConfigError, RequestError
from octavo.llm import LLM
from octavo.server.model import ServedModel, load_model
from octavo.swift.arguments import DeployArguments, InferArguments
from octavo.swift.dialect import SwiftDialect
from octavo.swift.engine import SwiftEngine, warn_of_idle_cards
from octavo.swift.messages import messages_to_history
from octavo.swift.template import Template
from octavo.swift.templates import check_template_type, get_template
from octavo.swift.terminal import Results, Terminal, answer_files
from octavo.swift.tokenizer import HfTokenizer


def infer_main(arguments: InferArguments) -> int:
    """A chat in the terminal, or the answers to a data set."""
    _say_backend(arguments)
    engine, template = prepare_vllm_engine_template(arguments)
    folder = None
    if arguments.save_result:
        folder = Path(arguments.result_dir) if arguments.result_dir else Path(engine.model_dir) / "infer_result"
    results = Results(folder)
    try:
        if arguments.val_dataset and not arguments.eval_human:
            answer_files(engine, template, arguments, results)
        else:
            Terminal(engine, template, stream=arguments.stream, results=results).loop()
    finally:
        engine.shutdown()
    if results.path is not None and results.path.exists():
        print(f"answers are kept in {results.path}", file=sys.stderr)
    return 0


def deploy_main(arguments: DeployArguments) -> int:
    """A server until a signal."""
    from octavo.server.run import run_server

    _say_backend(arguments)
    if arguments.resolved_template_type() is not None:
        _template_type(arguments)
    options, server_options = arguments.engine_options(), arguments.server_options()
    warn_of_idle_cards(options.device, arguments.tensor_parallel_size)

    def load() -> ServedModel:
        return _served(load_model(options, server_options), arguments, server_options)

    dialect = SwiftDialect(arguments.owned_by)
    return run_server(options, server_options, verbose=arguments.verbose, load=load, dialect=dialect)


def prepare_vllm_engine_template(args: InferArguments, use_async: bool = False) -> tuple[SwiftEngine, Template]:
    """The engine and the template that the arguments ask for, sampling parameters set."""
    if use_async:
        raise ConfigError("use_async=True is not for these functions; use octavo.swift.VllmEngine or octavo.AsyncLLM")
    template_type = _template_type(args)
    engine = SwiftEngine(LLM.from_options(args.engine_options()), args.resolved_model_type(), template_type)
    warn_of_idle_cards(engine.model_config.device, args.tensor_parallel_size)
    config = engine.generation_config
    config.max_tokens = args.max_new_tokens
    for name, value in args.sampling().items():
        setattr(config, name, value)
    config.num_beams = args.num_beams
    config.stop = [*config.stop, *args.stop_words]
    return engine, _template(args, template_type, engine.hf_tokenizer)


def _template(args: InferArguments, template_type: str, tokenizer: HfTokenizer) -> Template:
    limit = None if args.max_length < 0 else args.max_length
    return get_template(
        template_type, tokenizer, args.system, limit, args.truncation_strategy, tools_prompt=args.tools_prompt
    )


def _template_type(args: InferArguments) -> str:
    found = args.resolved_template_type()
    if found is None:
        raise ConfigError(
            f"which chat template {args.ckpt_dir or args.model_id_or_path} goes with is not known; give --model_type or"
            " --template_type"
        )
    check_template_type(found)
    return found


def _say_backend(arguments: InferArguments) -> None:
    if arguments.infer_backend != "AUTO":
        print(f"--infer_backend {arguments.infer_backend}: Octavo is the backend, by any name", file=sys.stderr)


# ---- the server's model ---------------------------------------------------------------------------------------


class TemplateModel(ServedModel):
    """A served model whose prompts are written by one of ms-swift's templates."""

    template: Template

    @property
    def is_chat(self) -> bool:
        return not self.template.is_generation

    def encode_messages(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        """Token ids of a chat; raises `RequestError`."""
        if variables or not add_generation_prompt:
            name = "chat_template_kwargs" if variables else "add_generation_prompt"
            raise RequestError(f"{name} is for a model's own template, but another is in use; leave it out", name)
        parts = messages_to_history(messages)
        if parts["response"] is not None:
            raise RequestError("the last message is the assistant's; end with one of the user", "messages")
        wanted = {name: parts[name] for name in ("system", "history", "history_roles", "query", "query_role")}
        try:
            found = self.template.encode(wanted)[0].get("input_ids")
        except AssertionError as error:
            raise RequestError(str(error), "messages") from None
        if found is None:
            limit = self.template.max_length
            raise RequestError(f"the prompt is longer than --max_length {limit}; shorten it", "messages")
        ids: list[int] = found
        return ids


def _served(model: ServedModel, arguments: DeployArguments, server_options: ServerOptions) -> ServedModel:
    """`model` with the template and the sampling defaults that the flags ask for."""
    # Where the model's file is silent, ms-swift draws from the 50 likeliest tokens.
    defaults = {"top_k": 50, **model.sampling_defaults, **arguments.sampling()}
    template_type = arguments.resolved_template_type()
    if template_type is None:
        return ServedModel(model.name, model.tokenizer, defaults)
    tokenizer = HfTokenizer(model.tokenizer, name_or_path=model.name)
    if template_type == "qwen" and tokenizer.inner.token_id("<|im_end|>") is not None:
        tokenizer.eos_token = "<|im_end|>"
    template = _template(arguments, template_type, tokenizer)
    stops = {stop: model.tokenizer.token_id(stop) for stop in template.stop_texts()}
    defaults["stop_token_ids"] = [index for index in stops.values() if index is not None]
    defaults["stop"] = [*arguments.stop_words, *(stop for stop, index in stops.items() if index is None)]
    served = TemplateModel(model.name, model.tokenizer, defaults)
    served.template = template
    return served
