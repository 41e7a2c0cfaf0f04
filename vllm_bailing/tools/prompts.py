"""Files of prompts, which are a user message on each line or JSONL with whole conversations; and their tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_bailing.errors import FilesError, Finding, shown, told
from vllm_bailing.folders import endless_file
from vllm_bailing.json_files import parsed, read_text

_FORM = 'give {"prompt": "..."} or {"messages": [...]}, and if you like "tools", "chat_template_kwargs" and "kind"'


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        messages: As in a request to `/v1/chat/completions`.
        kind: Of text, such as "code", by which results are told apart; may be empty.
        template: Further arguments of the chat template, as `chat_template_kwargs` of a request.
    """

    messages: list[dict[str, Any]]
    kind: str = ""
    tools: list[Any] | None = None
    template: dict[str, Any] = field(default_factory=dict)

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The tokens of the prompt through the chat template, or of its last message where the model has none.

        Raises:
            ValueError: If the template refuses it.
        """
        if not getattr(tokenizer, "chat_template", None):
            return tokenizer.encode(str(self.messages[-1].get("content") or ""))
        return _rendered(tokenizer, self.messages, tools=self.tools, return_dict=False, **self.template)


def templated(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation in the chat template, as text.

    Raises:
        ValueError: If the template refuses it.
    """
    return _rendered(tokenizer, messages, tokenize=False, **options)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"the chat template refuses a prompt ({shown(error)}): {told(messages)}") from None


def read_tokenizer(model: Path | str, remedy: str) -> Any:
    """The tokenizer of a checkpoint: its folder, or its name on the hub.

    Args:
        remedy: What to do if it has none, for the message.

    Raises:
        FilesError: If it has none that can be read and used.
    """
    from transformers import AutoTokenizer

    if detail := endless_file(Path(model)):
        raise FilesError(Finding(detail, "remove it, and fetch the files again"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        tokenizer.encode("?")
    except Exception as error:  # of any type, depending on the file that is wrong
        detail = f"{model} has no tokenizer that can be read ({shown(error)})"
        raise FilesError(Finding(detail, remedy)) from None
    return tokenizer


def read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers.

    Raises:
        ValueError: If there are none, or it is no text in UTF-8.
    """
    try:
        # Not splitlines, for which a separator of paragraphs within a JSON string or a message ends the line.
        lines = read_text(file).split("\n")
    except ValueError as error:
        raise ValueError(f"{file} {error}; name a file of prompts in UTF-8") from None
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{file} is empty; write one user message a line")
    return found


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file: JSONL if its name says so, else a user message on each line.

    Raises:
        ValueError: Naming the file and the line that is wrong.
    """
    lines = read_lines(file)
    if file.suffix != ".jsonl":
        return [Prompt([{"role": "user", "content": line}]) for _, line in lines]
    return [_prompt(line, f"{file}, line {number}") for number, line in lines]


def json_row(line: str, where: str, form: str) -> dict[str, Any]:
    """The object on a line of JSONL.

    Raises:
        ValueError: If it is none; the message ends with `form`.
    """
    try:
        row = parsed(line)
    except ValueError:
        raise ValueError(f"{where} is no JSON: {shown(line, 40)}; {form}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {told(row)}; {form}")
    return row


def _prompt(line: str, where: str) -> Prompt:
    row = json_row(line, where, _FORM)
    messages, template, tools = row.get("messages"), row.get("chat_template_kwargs") or {}, row.get("tools") or None
    if messages is None and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ValueError(f"{where} has neither a prompt nor messages; {_FORM}")
    if not isinstance(template, dict) or not isinstance(tools, list | None):
        raise ValueError(f"{where} has tools or chat_template_kwargs of the wrong type; {_FORM}")
    return Prompt(messages, str(row.get("kind") or ""), tools, template)
