"""Other tools' layouts of a checkpoint: what they would write of its tensors."""

import re

import torch

from tests.support.checkpoints import small_config
from vllm_bailing.tensor_names import main_tensors, mtp_tensors

SIZES = {"num_nextn_predict_layers": 1, "use_qkv_bias": True, "moe_intermediate_size": 48}
CONFIG = small_config(**SIZES)
PUBLISHED = main_tensors(CONFIG) | mtp_tensors(CONFIG)
WRAPPED = [
    "module.",
    "_orig_mod.",
    "actor.",
    "actor.module.",
    "base_model.model.",
    "model.",
    "policy._orig_mod.module.",
]


def split_projections(tensors, attention="attention"):
    sizes = [heads * CONFIG.head_dim for heads in (CONFIG.num_attention_heads, *[CONFIG.num_key_value_heads] * 2)]
    for name, tensor in tensors.items():
        head, middle, leaf = name.partition(".attention.query_key_value.")
        if not middle:
            yield name, tensor
            continue
        for which, part in zip("qkv", tensor.split(sizes), strict=True):
            yield f"{head}.{attention}.{which}_proj.{leaf}", part


def stacked_experts(tensors, where="experts", leaf=".weight"):
    stacks = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.mlp\.)experts\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            yield name, tensor
        else:
            stacks.setdefault(f"{match[1]}{where}.{match[3]}{leaf}", {})[int(match[2])] = tensor
    for name, stack in stacks.items():
        yield name, torch.stack([stack[expert] for expert in range(len(stack))])


def fused_experts(tensors):
    """As transformers 5 keeps them."""
    halves = {}
    for name, tensor in stacked_experts(tensors, leaf=""):
        head, middle, half = name.partition(".mlp.experts.")
        if middle and half in ("gate_proj", "up_proj"):
            halves.setdefault(head, {})[half] = tensor
        else:
            yield name, tensor
    for head, both in halves.items():
        yield f"{head}.mlp.experts.gate_up_proj", torch.cat((both["gate_proj"], both["up_proj"]), dim=1)


def padded_vocabulary(tensors):
    for name, tensor in tensors.items():
        is_table = name in ("model.word_embeddings.weight", "lm_head.weight")
        yield name, torch.cat((tensor, torch.zeros(64, tensor.shape[1]))) if is_table else tensor


def named_as_llama(tensors):
    for name, tensor in split_projections(tensors, "self_attn"):
        name = name.replace("word_embeddings", "embed_tokens").replace(".attention.dense.", ".self_attn.o_proj.")
        name = name.replace(".attention.query_layernorm.", ".self_attn.q_norm.")
        name = name.replace(".attention.key_layernorm.", ".self_attn.k_norm.")
        yield name.replace(".gate.expert_bias", ".gate.e_score_correction_bias"), tensor


LAYOUTS = {
    "published": lambda tensors: tensors.items(),
    "split projections": split_projections,
    "stacked experts": stacked_experts,
    "stacked experts, MLX": lambda tensors: stacked_experts(tensors, "switch_mlp"),
    "fused experts": fused_experts,
    "padded vocabulary": padded_vocabulary,
    "names of Llama": named_as_llama,
    "split and stacked": lambda tensors: stacked_experts(dict(split_projections(tensors))),
    "without the prefix": lambda tensors: ((name.removeprefix("model."), tensor) for name, tensor in tensors.items()),
    "inner wrappers": lambda tensors: (
        (name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."), tensor) for name, tensor in tensors.items()
    ),
    **{
        f"from {prefix}": lambda tensors, prefix=prefix: ((f"{prefix}{name}", one) for name, one in tensors.items())
        for prefix in WRAPPED
    },
}
