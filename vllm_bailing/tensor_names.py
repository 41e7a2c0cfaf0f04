"""Which tensors a BailingMoeV2 checkpoint holds: names and shapes, which follow from the configuration.

What becomes of each while loading, and why one is refused: `checkpoint_audit.py`. No nn.Module and no vLLM in here.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_bailing.config import BailingMoeV2Config

Shape = tuple[int, ...]
KV_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")
ROUTER = ".mlp.gate.weight"  # the end of its name
# Fixed scales of activations, and what else belongs to a quantized layer's inputs and outputs.
ACTIVATION_LEAVES = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
EMBEDDING, HEAD = "model.word_embeddings.weight", "lm_head.weight"
HEAD_MODULE = HEAD.removesuffix(".weight")
SCORE = "score.weight"  # the head of classification and reward models, which transformers names


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def layer_tensors(config: BailingMoeV2Config, layer: int, experts: int | None = None) -> dict[str, Shape]:
    """Names and shapes of one decoder layer, `layer` counted over main and MTP layers.

    Args:
        experts: How many of the routed experts, which are all of one shape, are named; all of them if left out.
    """
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    q_size = config.num_attention_heads * config.head_dim
    qkv_size = q_size + 2 * config.num_key_value_heads * config.head_dim
    tensors: dict[str, Shape] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.attention.query_key_value.weight": (qkv_size, hidden),
        f"{prefix}.attention.dense.weight": (hidden, q_size),
    }
    if config.use_qkv_bias:
        tensors[f"{prefix}.attention.query_key_value.bias"] = (qkv_size,)
    if config.use_bias:
        tensors[f"{prefix}.attention.dense.bias"] = (hidden,)
    if config.use_qk_norm:
        tensors[f"{prefix}.attention.query_layernorm.weight"] = (config.head_dim,)
        tensors[f"{prefix}.attention.key_layernorm.weight"] = (config.head_dim,)
    if layer < config.first_k_dense_replace:
        tensors.update(_mlp(f"{prefix}.mlp", hidden, config.intermediate_size))
    else:
        tensors[f"{prefix}{ROUTER}"] = (config.num_experts, hidden)
        tensors[f"{prefix}.mlp.gate.expert_bias"] = (config.num_experts,)
        for expert in range(config.num_experts if experts is None else experts):
            tensors.update(_mlp(f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size))
        if config.num_shared_experts:
            tensors.update(_mlp(f"{prefix}.mlp.shared_experts", hidden, config.shared_expert_intermediate_size))
    if layer >= config.num_hidden_layers:
        for norm in ("enorm", "hnorm", "final_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = (hidden,)
        tensors[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
    return tensors


def shard_shape(config: BailingMoeV2Config, names: list[str], shape: Shape, tp: int) -> Shape:
    """Shape that one of `tp` ranks keeps of a layer's tensor; `names` is its name after the layer's number, in parts.

    Norms, router and `eh_proj` are whole on every rank, as is the bias of a layer that is divided by its inputs.
    """
    if names[1:2] == ["query_key_value"]:
        heads = config.num_attention_heads // tp + 2 * max(1, config.num_key_value_heads // tp)
        return (heads * config.head_dim, *shape[1:])
    if names[-2:] in (["gate_proj", "weight"], ["up_proj", "weight"]):
        return (shape[0] // tp, shape[1])
    if names[-2:] in (["down_proj", "weight"], ["dense", "weight"]):
        return (shape[0], shape[1] // tp)
    return shape


def main_tensors(config: BailingMoeV2Config, head: str = HEAD) -> dict[str, Shape]:
    """Names and shapes of everything but the MTP layers.

    Args:
        head: `HEAD`, `SCORE`, or empty for a model that ends with its final norm.
    """
    vocab = (config.vocab_size, config.hidden_size)
    tensors: dict[str, Shape] = {EMBEDDING: vocab, "model.norm.weight": (config.hidden_size,)}
    if head == HEAD and not config.tie_word_embeddings:
        tensors[HEAD] = vocab
    if head == SCORE:
        tensors[SCORE] = (config.num_labels, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        tensors.update(layer_tensors(config, layer))
    return tensors


def mtp_tensors(config: BailingMoeV2Config) -> dict[str, Shape]:
    """Names and shapes of the MTP layers."""
    return {name: shape for layer in config.mtp_layer_ids for name, shape in layer_tensors(config, layer).items()}


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None."""
    parts = name.split(".", 3)
    is_number = name.startswith("model.layers.") and parts[2].isdecimal() and len(parts[2]) < 10
    return int(parts[2]) if is_number else None


def fused_module(name: str) -> str:
    """The module of the model on vLLM's layers in which a tensor is kept, some of them several together.

    All of a layer's experts are one module, and the projections `gate_proj` and `up_proj`; see `model.py`.
    """
    module = name.rpartition(".")[0].replace(".word_embeddings", ".embed_tokens")
    if ".mlp.experts." in module:
        return f"{module.partition('.mlp.experts.')[0]}.mlp.experts"
    head, _, last = module.rpartition(".")
    return f"{head}.gate_up_proj" if last in ("gate_proj", "up_proj") else module
