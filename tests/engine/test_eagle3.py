"""Other drafts: n-grams and EAGLE-3."""

import copy
import functools
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors, write_tensors
from tests.support.conversations import evenly
from tests.support.engine import TOLERANCE, run, run_in_turn
from tests.support.speculation import answers, draft_logits
from tests.support.versions import since
from vllm_bailing import DEMO
from vllm_bailing.reference import BailingMoeV2ForCausalLM


def test_ngram_drafts_change_no_answer(plain_answers):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    # n-grams import numba, and no second engine starts in a process with it: vLLM 0.32 looks through all modules for
    # kernels, and llvmlite's library answers to every name.
    ids, counted = run(answers, DEMO, 25, ngram)
    assert ids == evenly(plain_answers, 25)
    assert counted["accepted_tokens"] > 0


AUX_LAYERS = [1, 2, 3]  # hidden states behind so many of four layers


def make_eagle3(folder, hidden_size=64, vocab_size=256, heads=4):
    """A random EAGLE-3 draft in the format of the published ones.

    One Llama layer behind a projection, with a head for every second token: `d2t` tells how far a draft token's id is
    from the target's, `t2d` which of the target's tokens have one.
    """
    draft_vocab_size = vocab_size // 2
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 32,
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": AUX_LAYERS, "use_aux_hidden_state": True},
        "torch_dtype": "float32",
    }
    torch.manual_seed(1)
    q_size, kv_size = heads * 32, heads // 2 * 32
    shapes = {
        "fc": (hidden_size, 3 * hidden_size),
        "midlayer.self_attn.q_proj": (q_size, 2 * hidden_size),
        "midlayer.self_attn.k_proj": (kv_size, 2 * hidden_size),
        "midlayer.self_attn.v_proj": (kv_size, 2 * hidden_size),
        "midlayer.self_attn.o_proj": (hidden_size, q_size),
        "midlayer.mlp.gate_proj": (96, hidden_size),
        "midlayer.mlp.up_proj": (96, hidden_size),
        "midlayer.mlp.down_proj": (hidden_size, 96),
        "lm_head": (draft_vocab_size, hidden_size),
    }
    tensors = {f"{name}.weight": 0.15 * torch.randn(shape) for name, shape in shapes.items()}
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = torch.rand(hidden_size) + 0.5
    tensors["d2t"] = torch.arange(draft_vocab_size)  # token 2 * i less i
    tensors["t2d"] = torch.arange(vocab_size) % 2 == 0
    folder.mkdir(parents=True)
    write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def plain_eagle3_logits(target, draft, prompt):
    """What an EAGLE-3 draft computes, in plain PyTorch on the plain reference's hidden states.

    Source: EAGLE-3, arXiv 2503.01840, section 3.1; tensor names as in the published drafts.
    """
    reference = BailingMoeV2ForCausalLM.from_pretrained(target, dtype=torch.float32)
    config, w = json.loads((draft / "config.json").read_text()), read_tensors(draft)
    ids, head_dim = torch.tensor(prompt), config["head_dim"]
    states = reference(ids[None], output_hidden_states=True).hidden_states

    def norm(x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config["rms_norm_eps"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    hidden = linear(torch.cat([states[layer][0] for layer in AUX_LAYERS], -1), "fc")[:-1]
    embeds = reference.model.word_embeddings(ids[1:])
    x = torch.cat((norm(embeds, "midlayer.input_layernorm"), norm(hidden, "midlayer.hidden_norm")), -1)
    angles = torch.outer(
        torch.arange(len(x)), config["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    ).repeat(1, 2)

    def heads(name, turned):
        y = linear(x, f"midlayer.self_attn.{name}_proj").view(len(x), -1, head_dim).transpose(0, 1)
        first, second = y.chunk(2, -1)
        return y * angles.cos() + torch.cat((-second, first), -1) * angles.sin() if turned else y

    attended = torch.nn.functional.scaled_dot_product_attention(
        heads("q", True)[None], heads("k", True)[None], heads("v", False)[None], is_causal=True, enable_gqa=True
    )[0]
    hidden = hidden + linear(attended.transpose(0, 1).flatten(1), "midlayer.self_attn.o_proj")
    y = norm(hidden, "midlayer.post_attention_layernorm")
    gated = torch.nn.functional.silu(linear(y, "midlayer.mlp.gate_proj")) * linear(y, "midlayer.mlp.up_proj")
    return linear(norm(hidden + linear(gated, "midlayer.mlp.down_proj"), "norm"), "lm_head")


def test_an_eagle3_draft_gets_the_hidden_states_it_was_trained_on(tmp_path):
    target = make_checkpoint(tmp_path / "target", num_hidden_layers=4)
    draft = make_eagle3(tmp_path / "draft")
    eagle3 = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    logits = run(draft_logits, target, PROMPT, eagle3)
    wanted = plain_eagle3_logits(target, draft, PROMPT)
    assert torch.isneginf(logits[:, 1::2]).all()
    assert (logits[:, ::2].log_softmax(-1) - wanted.log_softmax(-1)).abs().max() <= TOLERANCE


def _run_in_two_stages(worker, split):
    """Let the target run as two pipeline stages do, one after the other in this process."""
    from vllm.distributed import parallel_state

    from vllm_bailing import model as ours

    whole = worker.model_runner.model.model

    def on(index):
        group = SimpleNamespace(world_size=2, is_first_rank=index == 0, is_last_rank=index == 1)
        return mock.patch.multiple(ours, get_pp_group=lambda: group), mock.patch.multiple(
            parallel_state, get_pp_group=lambda: group
        )

    stages = []
    for index, (start, end) in enumerate(((0, split), (split, len(whole.layers)))):
        stage = copy.copy(whole)
        stage.start_layer, stage.end_layer = start, end
        ours_on, vllm_on = on(index)
        with ours_on, vllm_on:
            stage._set_aux_hidden_state_layers(whole.aux_hidden_state_layers)
        stages.append(stage)

    def forward(input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        output = None
        for index, stage in enumerate(stages):
            ours_on, vllm_on = on(index)
            with ours_on, vllm_on:
                output = type(stage).forward(stage, input_ids, positions, output, inputs_embeds)
        return output

    whole.forward = forward


@since("0.31", "auxiliary hidden states between pipeline stages")
@pytest.mark.parametrize("split", [1, 2, 3])
def test_an_eagle3_draft_gets_them_from_all_pipeline_stages(split, tmp_path):
    """vLLM's CPU build has no drafts with stages, so what lies between them is a stand-in here."""
    target = make_checkpoint(tmp_path / "target", num_hidden_layers=4)
    draft = make_eagle3(tmp_path / "draft")
    eagle3 = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    logits = run_in_turn(draft_logits, target, PROMPT, eagle3, functools.partial(_run_in_two_stages, split=split))
    wanted = plain_eagle3_logits(target, draft, PROMPT)
    assert (logits[:, ::2].log_softmax(-1) - wanted.log_softmax(-1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_eagle3_drafts_change_no_answer(mode, tmp_path, plain_answers):
    draft = make_eagle3(tmp_path / "draft", hidden_size=128, vocab_size=1024)
    eagle3 = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    ids, counted = run_in_turn(answers, DEMO, 25, eagle3, enforce_eager=mode == "eager")
    assert ids == evenly(plain_answers, 25)
    assert counted["drafts"] > 0
