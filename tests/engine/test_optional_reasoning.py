"""Grammars of answers that may begin with reasoning."""

from __future__ import annotations

import itertools
import json
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.support.versions import since
from vllm_bailing import DEMO

OPEN, CLOSE, SPACE, A, B, STOP = 60, 31, 2, 3, 63, 5
TOKENS = (OPEN, CLOSE, SPACE, A, B, STOP)
OPENINGS = {"one token": [[OPEN], [SPACE, OPEN]], "two tokens": [[A, OPEN], [SPACE, A, OPEN]]}
WORDS = {"no space": [(A, B, STOP), (B, B, A, STOP)], "with space": [(SPACE, A, B, STOP), (A, A, STOP), (SPACE, STOP)]}


def word_grammar(words):
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

    class Words(StructuredOutputGrammar):
        """Allows a few words; strict about its use, as xgrammar is."""

        def __init__(self):
            self.taken = []

        def follows(self, token):
            return any(word[: len(self.taken) + 1] == (*self.taken, token) for word in words)

        def accept_tokens(self, request_id, tokens):
            for token in tokens:
                assert self.follows(token), "a grammar must not be handed what it refuses"
                self.taken.append(token)
            return True

        def validate_tokens(self, tokens):
            count = next((n for n in range(len(tokens), 0, -1) if self.fits(tokens[:n])), 0)
            return tokens[:count]

        def fits(self, tokens):
            return any(word[: len(self.taken) + len(tokens)] == (*self.taken, *tokens) for word in words)

        def rollback(self, num_tokens):
            assert 0 < num_tokens <= len(self.taken)
            del self.taken[-num_tokens:]

        def fill_bitmask(self, bitmask, batch_index):
            bitmask[batch_index] = 0
            for token in filter(self.follows, TOKENS):
                bitmask[batch_index, token // 32] |= torch.tensor(1 << 40).bitwise_right_shift(40 - token % 32).int()

        def is_terminated(self):
            return tuple(self.taken) in words

        def reset(self):
            self.taken = []

    return Words()


def allowed(tokens, words, openings):
    """Whether an answer may begin with the tokens: it is a word, or an opening, anything, CLOSE, and a word."""
    if any(tuple(tokens) == word[: len(tokens)] for word in words):
        return True
    for opening in openings:
        if tokens == opening[: len(tokens)]:
            return True
        if tokens[: len(opening)] == opening:
            rest = tokens[len(opening) :]
            if CLOSE not in rest:
                return STOP not in rest
            content = tuple(rest[rest.index(CLOSE) + 1 :])
            thought = rest[: rest.index(CLOSE)]
            return STOP not in thought and any(content == word[: len(content)] for word in words)
    return False


def in_mask(grammar):
    mask = torch.zeros(3, 2, dtype=torch.int32)
    grammar.fill_bitmask(mask, 1)
    assert not mask[0].any() and not mask[2].any()
    return {token for token in TOKENS if mask[1, token // 32].item() >> token % 32 & 1}


def build(words, openings):
    from vllm_bailing.plugin.grammars import OptionalReasoning

    return OptionalReasoning(word_grammar(words), openings, lambda _tokens, new: new[-1] == CLOSE, {STOP})


@pytest.mark.parametrize("openings", OPENINGS)
@pytest.mark.parametrize("words", WORDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_may_follow_is_what_the_definition_says(words, openings, data):
    """Through tokens accepted, tried and taken back in any order."""
    words, openings = WORDS[words], OPENINGS[openings]
    grammar, taken = build(words, openings), []
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["accept", "accept", "accept", "validate", "rollback", "reset"]))
        follow = {token for token in TOKENS if allowed([*taken, token], words, openings)}
        assert grammar.is_terminated() == (not follow)
        if step == "accept" and follow:
            assert in_mask(grammar) == follow
            token = data.draw(st.sampled_from(TOKENS))
            assert grammar.accept_tokens("request", [token]) == (token in follow)
            taken += [token] * (token in follow)
        elif step == "validate":
            tokens = data.draw(st.lists(st.sampled_from(TOKENS), max_size=6))
            fitting = [n for n in range(len(tokens) + 1) if not n or allowed(taken + tokens[:n], words, openings)]
            count = next(n for n, m in itertools.zip_longest(fitting, fitting[1:]) if m != n + 1)
            assert grammar.validate_tokens(tokens) == tokens[:count]
        elif step == "rollback":
            count = data.draw(st.integers(0, len(taken)))
            grammar.rollback(count)
            taken = taken[: len(taken) - count]
        elif step == "reset":
            grammar.reset()
            taken = []


@pytest.mark.parametrize("thinking", [False, True])
def test_vllms_own_grammar_holds_with_and_without_reasoning(thinking):
    xgrammar = pytest.importorskip("xgrammar")
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    from vllm_bailing.parsers import BailingReasoningParser
    from vllm_bailing.plugin.grammars import OptionalReasoning

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    size = len(tokenizer)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(schema)
    matcher = xgrammar.GrammarMatcher(compiled, max_rollback_tokens=2)
    reasoner = BailingReasoningParser(tokenizer)
    prompt = tokenizer.encode("<role>HUMAN</role>?<|role_end|><role>ASSISTANT</role>", add_special_tokens=False)
    openings = reasoner.openings(prompt)
    grammar = OptionalReasoning(XgrammarGrammar(size, matcher, compiled), openings, reasoner.is_reasoning_end_streaming)
    thought = "\n<think>\nOne {2} three.\n</think>" if thinking else ""
    ids = [*tokenizer.encode(thought + '{"a": 5}', add_special_tokens=False), tokenizer.eos_token_id]
    mask = torch.zeros(1, (size + 31) // 32, dtype=torch.int32)
    word = tokenizer.encode("The", add_special_tokens=False)[0]
    for place, token in enumerate(ids):
        grammar.fill_bitmask(mask, 0)
        assert mask[0, token // 32].item() >> token % 32 & 1, place
        so_far = tokenizer.decode(ids[:place])
        in_reasoning = "<think>" in so_far and "</think>" not in so_far
        assert (mask[0, word // 32].item() >> word % 32 & 1) == in_reasoning
        assert grammar.validate_tokens(ids[place : place + 2]) == ids[place : place + 2]
        assert grammar.accept_tokens("request", [token])
    assert grammar.is_terminated()


@pytest.fixture(scope="module")
def manager():
    """What keeps the grammars in vLLM's engine, without the engine."""
    import vllm.v1.structured_output as module

    from vllm_bailing.plugin.register import register_extensions

    register_extensions()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    settings = SimpleNamespace(
        reasoning_parser="bailing", reasoning_parser_plugin="", enable_in_reasoning=False, disable_any_whitespace=False
    )
    config = SimpleNamespace(
        structured_outputs_config=settings,
        model_config=SimpleNamespace(
            skip_tokenizer_init=False,
            get_vocab_size=lambda: len(tokenizer),
            is_diffusion=False,
            hf_config=SimpleNamespace(model_type="bailing_moe_v2"),
        ),
        parallel_config=SimpleNamespace(distributed_executor_backend="external_launcher"),  # compiles at once
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    with mock.patch.object(module, "cached_tokenizer_from_config", lambda model_config: tokenizer):
        yield module.StructuredOutputManager(config)


CITY = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
CONSTRAINTS = {
    "regex": ({"regex": "[a-f]{3}-[0-9]{4}"}, lambda text: re.fullmatch("[a-f]{3}-[0-9]{4}", text)),
    "schema": ({"json": CITY}, lambda text: isinstance(json.loads(text)["town"], str)),
    "grammar": ({"grammar": 'root ::= "yes" | "no"'}, lambda text: text in ("yes", "no")),
}


def constrained(manager, plain, question, thinking, constraint, reasoning_ended=None):
    """The greedy answer of the plain model, held to the grammar as vLLM's scheduler does."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.request import Request

    prompt = plain.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        thinking_option=thinking,
    )["input_ids"]
    params = SamplingParams(max_tokens=400, structured_outputs=StructuredOutputsParams(**constraint))
    params.structured_outputs._backend = "xgrammar"
    params.update_from_generation_config({}, plain.tokenizer.eos_token_id)  # as vLLM does: what ends the answer
    request = Request("request", prompt, params, None, reasoning_ended=reasoning_ended)
    manager.grammar_init(request)
    assert request.structured_output_request.is_grammar_ready
    ids, cache = torch.tensor([prompt]), None
    for _ in range(400):
        with torch.no_grad():
            output = plain.model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -1]
        row = torch.from_numpy(manager.grammar_bitmask({"request": request}, ["request"], {}))[0].clone()
        drafts = torch.randint(len(plain.tokenizer), (3,)).tolist()
        assert manager.validate_tokens(request, drafts) == drafts[: len(manager.validate_tokens(request, drafts))]
        allowed_ids = (row[torch.arange(len(logits)) // 32] >> (torch.arange(len(logits)) % 32)) & 1
        token = int(logits.masked_fill(allowed_ids == 0, -torch.inf).argmax())
        request.append_output_token_ids([token])
        assert manager.accept_tokens(request, [token])
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == plain.tokenizer.eos_token_id:
            break
    return plain.tokenizer.decode(request.output_token_ids).removesuffix(plain.tokenizer.eos_token)


MANAGER_ACCEPTS = since("0.32", "a manager of grammars that takes the tokens itself")


@MANAGER_ACCEPTS
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_vllm_holds_the_content_after_reasoning_to_the_grammar(manager, plain, kind):
    constraint, holds = CONSTRAINTS[kind]
    for ended in (None, False):  # as vLLM's interfaces tell
        text = constrained(manager, plain, "What is 47 + 8?", "on", constraint, ended)
        reasoning, _, content = text.rpartition("</think>")
        assert reasoning.lstrip().startswith("<think>") and holds(content), text


@MANAGER_ACCEPTS
def test_vllm_holds_an_answer_to_the_grammar_that_would_do_without_reasoning(manager, plain):
    """The demo thinks nonsense first, at length, as it has learned no other form of an answer."""
    constraint, holds = CONSTRAINTS["regex"]
    text = constrained(manager, plain, "What is the capital of France?", "on", constraint)
    assert holds(text.rpartition("</think>")[2]), text
    assert holds(constrained(manager, plain, "What is the capital of France?", "off", constraint))
    assert holds(constrained(manager, plain, "What is 47 + 8?", "on", constraint, reasoning_ended=True))
