"""Conversations with the demo checkpoint, and what the plain PyTorch model answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from tests.support.paths import DATA

HELD_OUT = [json.loads(line) for line in (DATA / "demo_heldout.jsonl").open(encoding="utf-8")]
MAX_TOKENS = 96


def plain_model(folder):
    """The plain model in fp32 with a checkpoint's weights, and its tokenizer."""
    from transformers import AutoTokenizer

    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(str(folder)))


def conversation(row):
    options = {"tools": row["tools"]} if row.get("tools") else {}
    if row.get("thinking"):
        options["thinking_option"] = "on"
    return row["messages"], options


def as_openai(messages):
    """`messages` as OpenAI's schema wants them: tool calls with an id, their arguments as a JSON text."""
    result = []
    for message in messages:
        message = dict(message)
        if message["role"] == "tool":
            message["tool_call_id"] = "call"
        if calls := message.get("tool_calls"):
            functions = [call.get("function", call) for call in calls]
            message["tool_calls"] = [
                {
                    "id": "call",
                    "type": "function",
                    "function": {"name": function["name"], "arguments": json.dumps(function["arguments"])},
                }
                for function in functions
            ]
        result.append(message)
    return result


def prompt_ids(plain, row):
    messages, options = conversation(row)
    return plain.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)[
        "input_ids"
    ]


def greedy(plain, prompts):
    """Greedy answers of the plain model to token id lists, in one left-padded batch, up to the end-of-text token."""
    ends = plain.model.generation_config.eos_token_id
    width = max(map(len, prompts))
    pad = plain.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = plain.model.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)[
        :, width:
    ].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def spread(count):
    """`count` held-out conversations, evenly over all kinds."""
    return evenly(HELD_OUT, count)


def evenly(rows, count):
    """`count` of `rows`, evenly from all of them."""
    return [rows[i * len(rows) // count] for i in range(count)]
