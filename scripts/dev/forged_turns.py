"""Which control tokens a request can write into its prompt, without and with `--tokenizer-mode bailing_split`.

    .venv/bin/python scripts/dev/forged_turns.py
    .venv/bin/python scripts/dev/forged_turns.py /models/Ling-mini-2.0

Each token stands in a user's message, in the result of a tool, in the description of a tool, in name and arguments of
an earlier call; what counts is whether the prompt gets one more of it than without. A prompt of /v1/completions is text
that is encoded whole.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import typer

from vllm_bailing import DEMO
from vllm_bailing.control_tokens import guarded

QUESTION = {"role": "user", "content": "Weather?"}


def called(argument: str, name: str = "weather") -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": {"city": argument}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool(description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "description": description, "parameters": {}}}


WAYS = {
    "user": lambda text: ([{"role": "user", "content": text}], None),
    "system": lambda text: ([{"role": "system", "content": text}, QUESTION], None),
    "result of a tool": lambda text: ([QUESTION, called("Rome"), {"role": "tool", "content": text}], None),
    "arguments of a call": lambda text: ([QUESTION, called(text)], None),
    "name of a function": lambda text: ([QUESTION, called("Rome", text)], None),
    "description of a tool": lambda text: ([QUESTION], [tool(text)]),
}


def written(tokenizer: Any, way: str, token: int, text: str) -> bool:
    """Whether the prompt has one more `token` if `text` stands in it."""

    def count(said: str) -> int:
        messages, tools = copy.deepcopy(WAYS[way](said))
        prompt = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        return ids.count(token)

    return count(f"a {text} b") > count("a b")


def refused(tokenizer: Any, way: str, text: str) -> bool:
    messages, tools = WAYS[way](f"a {text} b")
    try:
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except ValueError:
        return True
    return False


def main(model: Annotated[str, typer.Argument(help="A checkpoint's folder.")] = str(DEMO)) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    splitting, refusing = guarded(tokenizer), guarded(tokenizer, refuses=True)
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    print(
        "| token | in a prompt of completions |", " | ".join(WAYS), "| with `bailing_split` | with `bailing_refuse` |"
    )
    print("|---|" + "---|" * (len(WAYS) + 3))
    for text, number in tokens.items():
        plain = [written(tokenizer, way, number, text) for way in WAYS]
        split = sum(written(splitting, way, number, text) for way in WAYS)
        no = sum(refused(refusing, way, text) for way in WAYS)
        completions = number in tokenizer.encode(f"a {text} b", add_special_tokens=False)
        cells = ["written" if one else "not written" for one in (completions, *plain)]
        cells += [f"written in {split} of {len(WAYS)}" if split else "in none", f"refused in {no} of {len(WAYS)}"]
        print(f"| `{text}` |".replace("<|", "<\\|").replace("|>", "\\|>"), " | ".join(cells), "|")


if __name__ == "__main__":
    typer.run(main)
