"""vLLM's side of `--reasoning-parser bailing` and `--tool-call-parser bailing`.

`reasoning` and `tool_calls` read the text.

vLLM's tool parsers take seconds to import, so this module is imported only where one is asked for.
"""

from __future__ import annotations

import bisect
import enum
import json
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.reasoning import ReasoningParser
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tool_parsers import ToolParser
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from vllm_bailing.errors import RequestError, shown, told
from vllm_bailing.plugin import patches, shims
from vllm_bailing.reasoning import END_THINK, THINK, ReasoningStream
from vllm_bailing.tool_calls import CALL, END_CALL, Piece, ToolCall, ToolCallStream

TURN_END, ASSISTANT = "<|role_end|>", "<role>ASSISTANT</role>"
SWITCHES = {"thinking_option": ("on", "off", True, False), "enable_thinking": (True, False)}  # of the chat templates
logger = init_logger("vllm.plugins.bailing")
THINKING_OFF = "detailed thinking off"  # how the chat template ends the system turn


class BailingToolParser(ToolParser):
    """Tool calls of Ling 2.0 and Ring 2.0, for `--tool-call-parser bailing`.

    With `tool_choice` "required" or a named function vLLM constrains the answer to the same form.
    """

    # vLLM then passes deltas alone and calls `finish_streaming` at the end.
    engine_based_streaming = True
    structural_tag_model = "hermes"  # the grammar of this form

    def __init__(self, tokenizer: Any, tools: Any = None, **_: Any) -> None:
        super().__init__(tokenizer, tools)
        self._stream = ToolCallStream()

    def adjust_request(self, request: Any) -> Any:
        request = super().adjust_request(request)
        if request.tools and request.tool_choice != "none":
            _keep_tags(self.model_tokenizer, request)
        return request

    def get_structural_tag(self, request: Any, **options: Any) -> Any:
        """vLLM's grammar of the calls; one that the request demands fits the schema of its tool.

        vLLM itself looks at the schemas of tools with `strict` alone (from 0.31 on). `"strict": false` is respected.
        """
        if request.tool_choice != "auto":
            request = request.model_copy(update={"tools": [_with_schema(tool) for tool in request.tools or []]})
        return super().get_structural_tag(request, **options)

    def extract_tool_calls(self, model_output: str, request: Any) -> Any:
        protocol = shims.protocol()
        pieces: list[Piece] = [model_output]
        if request.tool_choice != "none":
            stream = ToolCallStream()
            pieces = stream.feed(model_output) + stream.close()
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        return protocol.ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[
                protocol.ToolCall(function=protocol.FunctionCall(name=call.name, arguments=call.arguments))
                for call in calls
            ],
            content=content or None,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> Any:
        return self._delta([delta_text] if request.tool_choice == "none" else self._stream.feed(delta_text))

    def finish_streaming(self) -> Any:
        """The last delta; vLLM calls this at the end of a stream."""
        return self._delta(self._stream.close())

    def _delta(self, pieces: Iterable[Piece]) -> Any:
        protocol = shims.protocol()
        content, calls = "", []
        for piece in pieces:
            if isinstance(piece, str):
                content += piece
                continue
            self.current_tool_id += 1
            # What vLLM compares at the end, to send what is missing.
            self.prev_tool_call_arr.append({"name": piece.name, "arguments": piece.arguments})
            self.streamed_args_for_tool.append(piece.arguments)
            calls.append(
                protocol.DeltaToolCall(
                    index=self.current_tool_id,
                    id=shims.make_tool_call_id(),
                    type="function",
                    function=protocol.DeltaFunctionCall(name=piece.name, arguments=piece.arguments),
                )
            )
        if not content and not calls:
            return None
        return protocol.DeltaMessage(content=content or None, tool_calls=calls)


def _with_schema(tool: Any) -> Any:
    """`tool` as vLLM takes it for one whose schema holds; its arguments are an object, whatever the schema says."""
    function = getattr(tool, "function", tool)
    if not hasattr(function, "parameters") or function.strict:
        return tool
    schema = function.parameters
    if function.strict is False or not schema or not _is_grammar(schema, function.name):
        schema = {"type": "object"}
    function = function.model_copy(update={"strict": True, "parameters": schema})
    return tool.model_copy(update={"function": function}) if hasattr(tool, "function") else function


def _is_grammar(schema: dict[str, Any], name: str) -> bool:
    """Whether vLLM can hold the arguments of tool `name` to `schema`; if not, it would refuse the request."""
    try:
        tag = json.dumps({"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}})
        validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(structural_tag=tag)))
    except Exception as error:  # of whatever kind xgrammar raises
        reason = shown(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        logger.warning(
            "Calls of tool %s are not held to its schema, which xgrammar cannot read: %s", told(name), reason
        )
        return False
    return True


class Thinking(enum.Enum):
    """What a prompt says about the answer's reasoning."""

    OPEN = "the prompt has opened it"
    OFF = "there is none, or it is over"
    OPTIONAL = "the answer opens it if it wants to"


def _written(value: Any) -> str:
    """What came in a request as JSON, for a message."""
    try:
        return shown(json.dumps(value))
    except RecursionError:
        return told(value)


class BailingReasoningParser(ReasoningParser):
    """Reasoning of Ling 2.0 and Ring 2.0, for `--reasoning-parser bailing`.

    The opening tag may stand in the answer (Ling, Ring-flash, Ring-1T) or at the end of the prompt (Ring-mini). With
    thinking off in the chat template the whole answer is content.
    """

    engine_based_streaming = True  # as above

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._template_options = dict(kwargs.get("chat_template_kwargs") or {})
        self._thinking: Thinking | None = None
        self._stream: ReasoningStream | None = None

    @property
    def reasoning_start_str(self) -> str:
        return THINK

    @property
    def reasoning_end_str(self) -> str:
        return END_THINK

    def adjust_request(self, request: Any) -> Any:
        """Refuse switches that the chat template would take for another value.

        Raises:
            RequestError: `thinking_option` or `enable_thinking` has a value that it cannot have.
        """
        for switch, values in SWITCHES.items():
            value = self._template_options.get(switch)
            if value not in (None, *values):
                wanted = " or ".join(map(json.dumps, values[:2]))
                raise RequestError(
                    f"chat_template_kwargs has {_written({switch: value})}, which the chat template would misread; "
                    f"give {wanted}"
                )
        _keep_tags(self.model_tokenizer, request)
        return request

    def openings(self, prompt_token_ids: Sequence[int]) -> list[list[int]]:
        """Token sequences with which an answer to this prompt may open its reasoning; none if that is settled."""
        self.set_prompt_token_ids(prompt_token_ids)
        if self._thinking is not Thinking.OPTIONAL:
            return []
        encode = self.model_tokenizer.encode
        return [encode(space + THINK, add_special_tokens=False) for space in ("", "\n")]

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether an answer to this prompt is content from its first token on."""
        self.set_prompt_token_ids(input_ids)
        return self._thinking is Thinking.OFF

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        """Take note of the prompt, which tells how to read the answer."""
        self._thinking = self._thinking_after(list(prompt_token_ids))

    def _thinking_after(self, prompt: list[int]) -> Thinking:
        turn_end = self.vocab.get(TURN_END)
        ends = [place for place, token in enumerate(prompt) if token == turn_end]
        begun = self._decode(prompt[ends[-1] + 1 :] if ends else prompt).rpartition(ASSISTANT)[2]
        if THINK in begun or END_THINK in begun:
            return Thinking.OPEN if begun.rfind(THINK) > begun.rfind(END_THINK) else Thinking.OFF
        system = self._decode(prompt[max(0, ends[0] - 32) : ends[0]]) if ends else ""
        return Thinking.OFF if system.rstrip().endswith(THINKING_OFF) else Thinking.OPTIONAL

    def _thinking_of_template(self) -> Thinking:
        """For answers whose prompt was not shown: vLLM up to 0.32 shows it for the first of several."""
        try:
            prompt = self.model_tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}],
                tokenize=False,
                **{**self._template_options, "add_generation_prompt": True},
            )
            return self._thinking_after(self.model_tokenizer.encode(prompt, add_special_tokens=False))
        except Exception:  # whatever a template raises
            return Thinking.OPTIONAL

    def _new_stream(self) -> ReasoningStream | None:
        if self._thinking is None:
            self._thinking = self._thinking_of_template()
        return None if self._thinking is Thinking.OFF else ReasoningStream(self._thinking is Thinking.OPEN)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether `delta_ids`, the last of `input_ids`, complete the closing tag."""
        new = list(delta_ids)
        tail = list(input_ids[-(len(new) + len(END_THINK)) :])
        return self._decode(tail).count(END_THINK) > self._decode(tail[: len(tail) - len(new)]).count(END_THINK)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        text = self._decode(input_ids)
        end = text.find(END_THINK)
        return [] if end < 0 else input_ids[self._tokens_up_to(input_ids, end + len(END_THINK)) :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of an answer between the tags."""
        ids, stream = list(token_ids), self._new_stream()
        text = self._decode(ids)
        if stream is None or not (stream.feed(text)[0] + stream.close()[0]):
            return 0
        start, end = text.find(THINK), text.find(END_THINK)
        first = self._tokens_up_to(ids, start + len(THINK)) if start >= 0 else 0
        return (self._tokens_up_to(ids, end) if end >= 0 else len(ids)) - first

    def _tokens_up_to(self, ids: list[int], size: int) -> int:
        """How many of `ids` it takes for `size` characters of text."""
        return bisect.bisect_left(range(len(ids)), size, key=lambda count: len(self._decode(ids[:count])))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.model_tokenizer.decode(ids, skip_special_tokens=False) if ids else ""

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        stream = self._new_stream()
        if stream is None:
            return None, model_output or None
        parts = zip(stream.feed(model_output), stream.close(), strict=True)
        reasoning, content = ("".join(part) or None for part in parts)
        return reasoning, content

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> Any:
        if self._stream is None:
            self._stream = self._new_stream() or ReasoningStream(is_open=False)
        return _message(*self._stream.feed(delta_text))

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Whether vLLM can treat what follows as content."""
        return self._stream is not None and self._stream.has_ended

    def finish_streaming(self) -> Any:
        """The last delta; vLLM calls this at the end of a stream and of the reasoning."""
        return None if self._stream is None else _message(*self._stream.close())


def _message(reasoning: str, content: str) -> Any:
    if not reasoning and not content:
        return None
    return shims.protocol().DeltaMessage(reasoning=reasoning or None, content=content or None)


def _keep_tags(tokenizer: Any, request: Any) -> None:
    """Have the tags in the text also where the tokenizer takes them for special tokens."""
    if {THINK, END_THINK, CALL, END_CALL} & set(tokenizer.all_special_tokens):
        request.skip_special_tokens = False


# vLLM imports this module where it reads answers and where it keeps grammars.
try:
    patches.hold_content_to_grammars(
        lambda reasoner, prompt: reasoner.openings(prompt) if isinstance(reasoner, BailingReasoningParser) else []
    )
except (ImportError, AttributeError) as error:
    logger.warning("Grammars do not hold in answers without reasoning on this vLLM, which is new: %s", error)
