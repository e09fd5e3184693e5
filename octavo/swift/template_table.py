"""The text templates of ms-swift 2.6.1 and a few later ones, as one table of facts.

A segment is a text, in which {{SYSTEM}}, {{QUERY}} and {{ROUND1}} are filled in, or a tuple of raw token ids, where a
name stands for the tokenizer's own id of that name. What is done with the segments, `template` knows.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files

Segment = str | tuple[int | str, ...]
Segments = tuple[Segment, ...]

BOS: Segment = ("bos_token_id",)
EOS: Segment = ("eos_token_id",)
HELPFUL = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """How one kind of chat is written.

    `prefix` opens a prompt without a system prompt, `system_prefix` one with it (None: no system prompt of its own).
    Each turn is `prompt`, the answer, and `chat_sep` if a turn follows (None: single turns only); `suffix` ends an
    answer. `auto_bos`: begin with the BOS token if the tokenizer would. `own_prefix`: begin with whatever the
    tokenizer puts before every text. `response_prefix` is the answer's beginning that the template itself writes.
    `faithful` holds the fields that ms-swift has differently by a slip, for strict compatibility.
    """

    prefix: Segments
    prompt: Segments
    chat_sep: Segments | None
    suffix: Segments
    default_system: str | None = None
    system_prefix: Segments | None = None
    auto_bos: bool = False
    own_prefix: bool = False
    is_generation: bool = False
    tools_prompt: str = "react_en"
    tool_prompt: Segments | None = None
    response_prefix: str = ""
    faithful: dict[str, Segments] = field(default_factory=dict)

    @property
    def has_system(self) -> bool:
        return self.system_prefix is not None or any("{{SYSTEM}}" in part for part in self.prompt)


def _facts(
    prefix: list[Segment],
    prompt: list[Segment],
    chat_sep: list[Segment] | None,
    suffix: list[Segment],
    default_system: str | None = None,
    system_prefix: list[Segment] | None = None,
    *,
    tool_prompt: list[Segment] | None = None,
    faithful: dict[str, list[Segment]] | None = None,
    auto_bos: bool = False,
    own_prefix: bool = False,
    is_generation: bool = False,
    tools_prompt: str = "react_en",
    response_prefix: str = "",
) -> TemplateFacts:
    return TemplateFacts(
        tuple(prefix),
        tuple(prompt),
        None if chat_sep is None else tuple(chat_sep),
        tuple(suffix),
        default_system,
        None if system_prefix is None else tuple(system_prefix),
        auto_bos=auto_bos,
        own_prefix=own_prefix,
        is_generation=is_generation,
        tools_prompt=tools_prompt,
        tool_prompt=None if tool_prompt is None else tuple(tool_prompt),
        response_prefix=response_prefix,
        faithful={name: tuple(value) for name, value in (faithful or {}).items()},
    )


@cache
def _system(name: str) -> str:
    """The default system prompt of a template whose makers gave it a long one."""
    text = files("octavo.swift").joinpath("data/default_systems.json").read_text("utf-8")
    return str(json.loads(text)[name])


def _chatml(default_system: str | None = None, *, auto_bos: bool = False, response_prefix: str = "") -> TemplateFacts:
    return _facts(
        [],
        ["<|im_start|>user\n{{QUERY}}<|im_end|>\n<|im_start|>assistant\n"],
        ["<|im_end|>\n"],
        ["<|im_end|>"],
        default_system,
        ["<|im_start|>system\n{{SYSTEM}}<|im_end|>\n"],
        auto_bos=auto_bos,
        response_prefix=response_prefix,
    )


def _llama3(default_system: str | None = None) -> TemplateFacts:
    answer = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return _facts(
        ["<|begin_of_text|>"],
        ["<|start_header_id|>user<|end_header_id|>\n\n{{QUERY}}<|eot_id|>" + answer],
        ["<|eot_id|>"],
        ["<|eot_id|>"],
        default_system,
        ["<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{{SYSTEM}}<|eot_id|>"],
        tools_prompt="toolbench",
        tool_prompt=["<|start_header_id|>tool<|end_header_id|>\n\n{{QUERY}}<|eot_id|>" + answer],
    )


def _llama3_2() -> TemplateFacts:
    # {{DATE}} is the day on which the template is made, as in "Today Date: 26 Jul 2024".
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    head += "Cutting Knowledge Date: December 2023\nToday Date: {{DATE}}\n\n"
    return replace(_llama3(), prefix=(head + "<|eot_id|>",), system_prefix=(head + "{{SYSTEM}}<|eot_id|>",))


def _glm(name: str | None, suffix: str) -> TemplateFacts:
    glm4 = name == "glm4"
    return _facts(
        [],
        ["<|user|>\n{{QUERY}}<|assistant|>\n"],
        [],
        [suffix],
        _system("codegeex4") if name == "codegeex4" else None,
        ["<|system|>\n{{SYSTEM}}"],
        own_prefix=True,
        tools_prompt="glm4" if glm4 else "react_en",
        tool_prompt=["<|observation|>\n{{QUERY}}<|assistant|>\n"] if glm4 else None,
    )


def _deepseek(bos: Segment, eos: Segment) -> TemplateFacts:
    return _facts([bos], ["User: {{QUERY}}\n\nAssistant:"], [eos], [eos], None, [bos, "{{SYSTEM}}\n\n"])


def _cohere(default_system: str) -> TemplateFacts:
    end = "<|END_OF_TURN_TOKEN|>"
    head = "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{SYSTEM}}"
    return _facts(
        ["<BOS_TOKEN>"],
        ["<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{QUERY}}" + end + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"],
        [end],
        [end],
        default_system,
        [head + end],
        faithful={"system_prefix": [head + end.removesuffix(">")]},
    )


def _instruct_with_system(
    before: str, prompt: list[Segment], sep: list[Segment] | None, suffix: list[Segment], system: str | None = None
) -> TemplateFacts:
    """A template whose system prompt stands bare after `before`, with or without it."""
    return _facts([before] if before else [], prompt, sep, suffix, system, [before + "{{SYSTEM}}"])


def built_in() -> dict[str, TemplateFacts]:
    """Template type -> facts. Made anew at each call: whoever registers more does so in a mapping of their own."""
    return _generation() | _chatml_kind() | _llama_kind() | _chinese() | _others()


def _generation() -> dict[str, TemplateFacts]:
    return {
        "default": _facts(
            [],
            ["### Human:\n{{QUERY}}\n\n### Assistant:\n"],
            ["\n\n"],
            [EOS],
            HELPFUL,
            ["{{SYSTEM}}\n\n"],
            auto_bos=True,
        ),
        "default-generation": _facts([], ["{{QUERY}}"], None, [EOS], auto_bos=True, is_generation=True),
        "default-generation-bos": _facts([BOS], ["{{QUERY}}"], None, [EOS], is_generation=True),
        "chatglm-generation": _facts([], ["{{QUERY}}"], None, [EOS], own_prefix=True, is_generation=True),
    }


def _chatml_kind() -> dict[str, TemplateFacts]:
    qwen25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    smollm = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return {
        "chatml": _chatml(auto_bos=True),
        "yi": _chatml(auto_bos=True),
        "yi1_5": _chatml(auto_bos=True),
        "yi-coder": _chatml(HELPFUL, auto_bos=True),
        "qwen": _chatml(HELPFUL),
        "qwen2_5": _chatml(qwen25),
        "qwq": _chatml(_system("qwq")),
        "marco_o1": _chatml(_system("marco_o1")),
        "qwen3": _chatml(),
        "qwen3_nothinking": _chatml(response_prefix="<think>\n\n</think>\n\n"),
        "qwen3_thinking": _chatml(response_prefix="<think>\n"),
        "smollm": _chatml(smollm),
        "internlm2": _chatml(_system("internlm"), auto_bos=True),
        "dbrx": _chatml(_system("dbrx"), auto_bos=True),
    }


def _llama_kind() -> dict[str, TemplateFacts]:
    system = "<<SYS>>\n{{SYSTEM}}\n<</SYS>>\n\n"
    return {
        "llama": _facts(
            ["<s>[INST] "],
            ["{{QUERY}} [/INST]"],
            ["</s><s>[INST] "],
            ["</s>"],
            _system("llama"),
            ["<s>[INST] " + system],
        ),
        "longwriter-llama3": _facts(["[INST]"], ["{{QUERY}}[/INST]"], ["[INST]"], ["<|end_of_text|>"], None, [system]),
        # The system prompt stands in the last turn, as Mistral's own template has it.
        "mistral-nemo": _facts(["<s>[INST] "], ["{{SYSTEM}}\n\n", "{{QUERY}}[/INST]"], ["</s>[INST] "], ["</s>"]),
        "llama3": _llama3(),
        "llama3_2": _llama3_2(),
        "reflection": _llama3(_system("reflection")),
        "phi3": _facts(
            [],
            ["<|user|>\n{{QUERY}}<|end|>\n<|assistant|>\n"],
            ["<|end|>\n"],
            ["<|end|>"],
            None,
            ["<|system|>\n{{SYSTEM}}<|end|>\n"],
            auto_bos=True,
        ),
        "gemma": _facts(
            ["<bos>"],
            ["<start_of_turn>user\n{{QUERY}}<end_of_turn>\n<start_of_turn>model\n"],
            ["<end_of_turn>\n"],
            ["<end_of_turn>"],
            None,
            ["<bos><start_of_turn>system\n{{SYSTEM}}<end_of_turn>\n"],
        ),
        "zephyr": _facts(
            [],
            ["<|user|>\n{{QUERY}}</s>\n<|assistant|>\n"],
            ["</s>\n"],
            ["</s>"],
            None,
            ["<|system|>\n{{SYSTEM}}</s>\n"],
        ),
        "wizardlm2": _instruct_with_system(
            "", ["USER: {{QUERY}} ASSISTANT:"], ["</s>"], ["</s>"], _system("wizardlm2")
        ),
        "wizardlm2-awq": _instruct_with_system("", ["User:\n{{QUERY}}\n\nAssistant:\n"], ["\n\n"], ["</s>"]),
        "c4ai": _cohere(_system("c4ai")),
        "aya": _cohere(_system("aya")),
    }


def _chinese() -> dict[str, TemplateFacts]:
    return {
        "baichuan": _instruct_with_system("", [(195,), "{{QUERY}}", (196,)], [], [EOS]),
        "chatglm2": replace(
            _instruct_with_system("", ["[Round {{ROUND1}}]\n\n问：{{QUERY}}\n\n答："], ["\n\n"], [EOS]),
            own_prefix=True,
        ),
        "chatglm3": _glm(None, "<|user|>"),
        "chatglm4": _glm("glm4", "<|user|>"),
        "codegeex4": _glm("codegeex4", "<|endoftext|>"),
        "internlm": _facts(
            ["<s>"],
            ["<|User|>:{{QUERY}}\n<|Bot|>:"],
            ["<eoa>\n"],
            ["<eoa>"],
            _system("internlm"),
            ["<s><|System|>:{{SYSTEM}}\n"],
        ),
        "xverse": _instruct_with_system("", ["Human: {{QUERY}}\n\nAssistant: "], [EOS], [EOS]),
        "yuan": _facts([], ["{{QUERY}}<sep>"], None, [EOS]),
        # Without a system prompt these two have no BOS either: ms-swift drops the whole prefix.
        "ziya": _facts([], ["<human>:{{QUERY}}\n<bot>:"], ["\n"], [EOS], None, [BOS, "{{SYSTEM}}"]),
        "bluelm": _facts([], ["[|Human|]:{{QUERY}}[|AI|]:"], [], [EOS], None, [BOS, "{{SYSTEM}}"]),
        "skywork": _instruct_with_system("<s>", ["</s><s>[USER]{{QUERY}}[SEP][BOT]"], None, ["[SEP]</s>"]),
        "codefuse": _facts(
            [], ["<s>human\n{{QUERY}}\n<s>bot\n"], [EOS, "\n"], [EOS], None, ["<s>system\n{{SYSTEM}}\n"]
        ),
        "codefuse-codellama": _instruct_with_system(
            "",
            ["<|role_start|>human<|role_end|>{{QUERY}}<|role_start|>bot<|role_end|>"],
            [],
            [EOS],
        ),
        "orion": _instruct_with_system("<s>", ["Human: {{QUERY}}\n\nAssistant: </s>"], ["</s>"], ["</s>"]),
        "minicpm": _instruct_with_system("<s>", ["<用户>{{QUERY}}<AI>"], [], ["</s>"]),
        "telechat": _facts([], ["<_user>{{QUERY}}<_bot>"], ["<_end>"], ["<_end>"]),
        "telechat2": _facts(["<_start>"], [(4,), "{{QUERY}}", (5,)], ["<_end>"], ["<_end>"]),
        "mengzi": _facts([], ["输入：{{QUERY}}输出：\n"], [], [EOS], None, ["指令：{{SYSTEM}}"]),
        "atom": _instruct_with_system("", ["<s>Human: {{QUERY}}\n</s><s>Assistant: "], ["</s>"], ["</s>"]),
        "sus": _instruct_with_system(
            "", ["### Human: {{QUERY}}\n\n### Assistant: "], ["<|endoftext|>"], ["<|endoftext|>"]
        ),
        "modelscope-agent": _facts(
            [],
            [" \n\n<|user|>:{{QUERY}} \n\n<|assistant|>:"],
            [],
            [" \n\n</s>"],
            HELPFUL,
            [" \n\n<|system|>:{{SYSTEM}}"],
        ),
    }


def _others() -> dict[str, TemplateFacts]:
    end, slip = "<｜end▁of▁sentence｜>", "<｜end_of_sentense｜>"
    return {
        "openbuddy": _facts(
            [],
            ["User: {{QUERY}}\nAssistant:"],
            ["\n"],
            [EOS],
            _system("openbuddy"),
            ["{{SYSTEM}}\n\n"],
            auto_bos=True,
        ),
        "openbuddy2": _facts(
            [],
            ["<|role|>user<|says|>{{QUERY}}<|end|>\n<|role|>assistant<|says|>"],
            ["<|end|>\n"],
            ["<|end|>"],
            _system("openbuddy2"),
            ["<|role|>system<|says|>{{SYSTEM}}<|end|>\n"],
            auto_bos=True,
        ),
        "deepseek": _deepseek(BOS, EOS),
        "deepseek2": _deepseek((100000,), (100001,)),
        "deepseek2_5": _facts(
            ["<｜begin▁of▁sentence｜>"],
            ["<｜User｜>{{QUERY}}<｜Assistant｜>"],
            [end],
            [end],
            None,
            ["<｜begin▁of▁sentence｜>{{SYSTEM}}"],
            faithful={"chat_sep": [slip], "suffix": [slip]},
        ),
        "deepseek-coder": _instruct_with_system(
            "",
            ["### Instruction:\n{{QUERY}}\n### Response:\n"],
            ["\n<|EOT|>\n"],
            ["\n<|EOT|>"],
            _system("deepseek-coder"),
        ),
        "numina-math": _facts(
            [BOS], ["### Problem: {{QUERY}}\n### Solution: "], ["\n"], [EOS], None, [BOS, "{{SYSTEM}}"]
        ),
    }
