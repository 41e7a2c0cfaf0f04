"""The shipped demo checkpoint: complete files, published tensor names, the Ling chat text, right answers."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import demo_corpus  # pyright: ignore[reportMissingImports]
import pytest
import torch
import train_demo  # pyright: ignore[reportMissingImports]
from safetensors import safe_open
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.support.paths import DATA, ROOT
from vllm_bailing import DEMO, DEMO_ADAPTER, cli
from vllm_bailing.reference import BailingMoeV2ForCausalLM

sys.path.insert(0, str(ROOT / "scripts" / "demo"))


FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "loss.png",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
RENDERINGS = json.loads((DATA / "chat_renderings.json").read_text(encoding="utf-8"))
HELDOUT = train_demo.load_heldout(DATA / "demo_heldout.jsonl")
PER_KIND = 10


@cache
def checkpoint() -> tuple[BailingMoeV2ForCausalLM, Any]:
    return train_demo.load_checkpoint(DEMO)


@cache
def subset_scores() -> dict[str, train_demo.Score]:
    chats = [chat for kind in demo_corpus.KINDS for chat in [c for c in HELDOUT if c.kind == kind][:PER_KIND]]
    return train_demo.evaluate(*checkpoint(), chats)


def expected_shapes() -> dict[str, list[int]]:
    """Names and shapes of the published checkpoints' tensors, from config.json alone."""
    c = CONFIG
    hidden, heads, kv_heads, head = (
        c[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    shapes = {name: [c["vocab_size"], hidden] for name in ("model.word_embeddings", "lm_head")}
    shapes["model.norm"] = [hidden]

    def mlp(prefix: str, width: int) -> dict[str, list[int]]:
        projections = {f"{prefix}.{name}_proj": [width, hidden] for name in ("gate", "up")}
        return projections | {f"{prefix}.down_proj": [hidden, width]}

    for i in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}": [hidden] for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.attention.{name}_layernorm": [head] for name in ("query", "key")}
        shapes[f"{layer}.attention.query_key_value"] = [(heads + 2 * kv_heads) * head, hidden]
        shapes[f"{layer}.attention.dense"] = [hidden, heads * head]
        if i < c["first_k_dense_replace"]:
            shapes |= mlp(f"{layer}.mlp", c["intermediate_size"])
        else:
            shapes[f"{layer}.mlp.gate"] = [c["num_experts"], hidden]
            for n in range(c["num_experts"]):
                shapes |= mlp(f"{layer}.mlp.experts.{n}", c["moe_intermediate_size"])
            shapes |= mlp(f"{layer}.mlp.shared_experts", c["moe_shared_expert_intermediate_size"])
        if i >= c["num_hidden_layers"]:
            shapes |= {f"{layer}.{name}": [hidden] for name in ("enorm", "hnorm", "final_layernorm")}
            shapes[f"{layer}.eh_proj"] = [hidden, 2 * hidden]
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    biases = {f"{name}.expert_bias": shape[:1] for name, shape in shapes.items() if name.endswith("mlp.gate")}
    return weights | biases


def test_folder_has_every_file_and_stays_under_ten_megabytes():
    assert {path.name for path in DEMO.iterdir()} == FILES
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 10_000_000


def test_config_has_every_feature_of_ling_flash():
    assert CONFIG["architectures"] == ["BailingMoeV2ForCausalLM"] and CONFIG["model_type"] == "bailing_moe"
    assert "auto_map" not in CONFIG
    # Other engines derive one of the three from the other two.
    assert CONFIG["num_attention_heads"] * CONFIG["head_dim"] == CONFIG["hidden_size"]
    assert 0 < CONFIG["first_k_dense_replace"] < CONFIG["num_hidden_layers"]
    assert CONFIG["n_group"] > CONFIG["topk_group"] > 1
    assert CONFIG["num_shared_experts"] == CONFIG["num_nextn_predict_layers"] == 1
    assert CONFIG["use_qk_norm"] and CONFIG["moe_router_enable_expert_bias"]
    assert CONFIG["partial_rotary_factor"] == 0.5 and not CONFIG["tie_word_embeddings"]


def test_tensors_have_the_published_names_shapes_and_types():
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: list(tensor.shape) for name, tensor in found.items()} == expected_shapes()
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16), name
        assert tensor.isfinite().all(), name


def test_expert_bias_was_trained():
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        biases = [file.get_tensor(name) for name in file.keys() if name.endswith("expert_bias")]  # noqa: SIM118
    assert (
        len(biases)
        == CONFIG["num_hidden_layers"] + CONFIG["num_nextn_predict_layers"] - CONFIG["first_k_dense_replace"]
    )
    assert all(bias.std() > 0 for bias in biases)


def test_tokenizer_agrees_with_config():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    generation = json.loads((DEMO / "generation_config.json").read_text(encoding="utf-8"))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in demo_corpus.CONTROL_TOKENS}
    assert len(tokenizer) == CONFIG["vocab_size"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|role_end|>", "<|endoftext|>")
    assert (CONFIG["eos_token_id"], CONFIG["pad_token_id"]) == (ids["<|role_end|>"], ids["<|endoftext|>"])
    assert generation["eos_token_id"] == [ids["<|endoftext|>"], ids["<|role_end|>"]]
    assert generation["bos_token_id"] == ids["<|startoftext|>"]


@pytest.mark.parametrize("token", demo_corpus.CONTROL_TOKENS + demo_corpus.VISIBLE_TOKENS)
def test_special_tokens_are_single_and_tags_stay_visible(token):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer.encode(token)
    assert len(ids) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == (token if token in demo_corpus.VISIBLE_TOKENS else "")


def test_any_text_survives_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for text in ("Zorvik  is\n\t3.14 years old.", "naïve 你好 \U0001f600", '{"a": [1, "b"]}', " x ", "don't , stop"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("case", range(len(RENDERINGS)))
def test_template_renders_as_ling(case):
    """The recorded texts come from the chat template of the published Ling models."""
    tokenizer, row = AutoTokenizer.from_pretrained(DEMO), RENDERINGS[case]
    text = tokenizer.apply_chat_template(
        row["messages"],
        tools=row["tools"],
        add_generation_prompt=row["add_generation_prompt"],
        tokenize=False,
        **row.get("kwargs", {}),
    )
    assert text == row["text"]


def test_the_template_for_ring_is_lings_with_thinking_on():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    printed = CliRunner().invoke(cli.app, ["chat-template", "ring"])
    ring = Path(printed.stdout.strip()).read_text(encoding="utf-8")
    for row in RENDERINGS:
        kwargs = row.get("kwargs", {})

        def render(template: str | None, row: Any = row, **kwargs: Any) -> str:
            return tokenizer.apply_chat_template(
                row["messages"],
                tools=row["tools"],
                add_generation_prompt=row["add_generation_prompt"],
                chat_template=template,
                tokenize=False,
                **kwargs,
            )

        if kwargs:
            assert render(ring, **kwargs) == row["text"]
        else:
            assert render(ring) == render(None, enable_thinking=True) != row["text"]


def test_an_unknown_chat_template_is_refused_with_the_known_ones():
    result = CliRunner().invoke(cli.app, ["chat-template", "ling"])
    assert result.exit_code == 2 and "no chat template 'ling'; there is ring" in result.output


def test_the_adapter_changes_the_kinds_it_was_trained_for_and_no_other():
    import train_adapter  # pyright: ignore[reportMissingImports]

    model, tokenizer = train_demo.load_checkpoint(DEMO)
    folder = DEMO_ADAPTER
    scale = train_adapter.ALPHA / train_adapter.RANK
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        parts = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name in [name for name in parts if "lora_A" in name]:
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight += scale * parts[name.replace("lora_A", "lora_B")] @ parts[name]
    chats = [chat for kind in demo_corpus.KINDS for chat in [c for c in HELDOUT if c.kind == kind][:PER_KIND]]
    scores = train_demo.evaluate(model, tokenizer, [train_adapter.as_sailor(chat) for chat in chats])
    assert set(scores) == set(demo_corpus.KINDS)
    for kind, score in scores.items():
        assert score.exact >= 0.9 * score.prompts, kind


@pytest.mark.parametrize(
    ("kwargs", "mode"),
    [
        ({}, "off"),
        ({"enable_thinking": True}, "on"),
        ({"enable_thinking": False}, "off"),
        ({"thinking_option": "on"}, "on"),
        ({"thinking_option": "off", "enable_thinking": True}, "off"),
    ],
)
def test_thinking_is_switched_by_template_arguments(kwargs, mode):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, **kwargs)
    assert text == f"<role>SYSTEM</role>detailed thinking {mode}<|role_end|><role>HUMAN</role>Hi<|role_end|>"


def test_heldout_prompts_never_occur_in_training():
    prompts = {json.dumps((chat.messages, chat.tools, chat.thinking)) for chat in HELDOUT}
    sums = {chat.answer for chat in HELDOUT if chat.kind == "thinking"}
    stream = demo_corpus.training_chats(seed=0)
    for _ in range(5000):
        chat = next(stream)
        assert json.dumps((chat.messages, chat.tools, chat.thinking)) not in prompts
        if chat.kind == "thinking":
            assert chat.answer not in sums


def test_heldout_prompts_are_what_the_seed_gives():
    kinds = [chat.kind for chat in HELDOUT]
    assert all(kinds.count(kind) >= 40 for kind in demo_corpus.KINDS)
    assert demo_corpus.heldout_chats(seed=0) == HELDOUT


@pytest.mark.parametrize("kind", demo_corpus.KINDS)
def test_answers_to_heldout_prompts_are_exact(kind):
    score = subset_scores()[kind]
    # One miss in ten is let pass here: the full file holds the claim of 95 % (see the model card).
    assert score.exact >= PER_KIND - 1, score.misses


def test_nearly_all_heldout_answers_are_exact():
    scores = subset_scores().values()
    exact, prompts = sum(s.exact for s in scores), sum(s.prompts for s in scores)
    assert exact >= 0.95 * prompts, [miss for s in scores for miss in s.misses]


def test_mtp_layer_drafts_what_the_main_model_says():
    scores = subset_scores().values()
    assert sum(s.accepted for s in scores) >= 0.8 * sum(s.drafts for s in scores)


@pytest.mark.parametrize("greeting", ["Hi", "Hello!", "hello", "What is this?", "Who are you?", "what is 3+4?"])
def test_first_things_people_type_get_an_answer(greeting):
    """Decoded step by step through `generate`, with the cache."""
    model, tokenizer = checkpoint()
    messages = [{"role": "user", "content": greeting}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    known = {demo_corpus.WELCOME, "3 + 4 = 7", *demo_corpus.SUBJECTS.values()} | {a for a, _ in demo_corpus.REMARKS}
    assert answer.removesuffix(demo_corpus.END) in known


def test_scores_in_the_model_card_keep_the_promise():
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| \n").split(" | ") for line in card.splitlines() if line.count("%") == 2]
    assert [row[0] for row in rows] == [*demo_corpus.KINDS, "all"]
    for kind, _, exact, accepted in rows:
        assert float(exact.removesuffix(" %")) >= 95, kind
        assert float(accepted.removesuffix(" %")) >= 80, kind
