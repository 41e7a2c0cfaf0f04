"""What `vllm-bailing train-mtp` needs, on paper: memory, disk, arithmetic and hours.

Letters: H hidden size, V vocabulary, E routed experts, K experts per token, S draft steps, N tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.choice import tp_obstacle
from vllm_bailing.planning.gpus import Gpu
from vllm_bailing.planning.memory import Layout
from vllm_bailing.planning.roofline import bound
from vllm_bailing.tensor_names import layer_tensors, main_tensors

TRAINED_BYTES = 16  # of a trained number: itself in fp32, its gradient, and two moments of AdamW (ZeRO, 1910.02054)
SAVED_BYTES = 12  # without the gradient
STATE_BYTES = 2  # of a recorded number: bfloat16
# Rows of logits that are held at once, and copies of them in fp32: draft and target, their logarithms and a gradient.
LOSS_ROWS, LOGIT_COPIES = 1024, 6
LORA_RANK = 16
EXPERTS = ".experts."  # in the name of what a routed expert consists of
# What of a layer `--train attention` trains, and the matrices to which `--train lora` adds factors.
ATTENTION = re.compile(r"attention\.|mlp\.shared_experts\.|eh_proj|norm")
LORA = re.compile(r"(attention\.(query_key_value|dense)|mlp\.shared_experts\.(gate|up|down)_proj|eh_proj)\.weight")
# Share of a GPU's peak that training reaches: Ling-mini-2.0 on 8 x H100, 128,298 tokens/s by the README of Ling-V2, are
# 6 x 1.4e9 FLOPs each of 8 x 989e12 FLOP/s.
UTILIZATION = 0.14
_ANSWERED_AT_ONCE = 256


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs: to record the target's states, and then to train the layer; never both at once."""

    record: int
    train: int


@dataclass(frozen=True)
class TrainingPlan:
    """A run on paper.

    Attributes:
        tokens: Of all answers with their prompts; each is learnt from once.
        disk: Bytes of recorded states.
        memory: By what is trained.
        record_fits: Whether the target's weights fit into all GPUs together.
        fits: Whether one GPU holds the training, by what is trained.
        sharded, sharded_fits: The same of each of all GPUs, where the layer is sharded over them.
        answer_hours: At the roofline of decoding, which no engine passes; None where tensor parallelism cannot divide
            the model by the GPUs.
        record_hours: At `UTILIZATION` of one GPU: layers run one after the other, wherever they are.
        train_hours, sharded_hours: At `UTILIZATION` of one GPU, and of all.
    """

    tokens: int
    disk: int
    memory: dict[str, Memory]
    record_fits: bool
    fits: dict[str, bool]
    sharded: dict[str, Memory]
    sharded_fits: dict[str, bool]
    answer_hours: float | None
    record_hours: float
    train_hours: float
    sharded_hours: float


def layer_elements(config: BailingMoeV2Config) -> int:
    """Numbers of the MTP layer."""
    return sum(math.prod(shape) for shape in layer_tensors(config, config.num_hidden_layers).values())


def expert_elements(config: BailingMoeV2Config) -> int:
    """Numbers of its routed experts."""
    tensors = layer_tensors(config, config.num_hidden_layers)
    return sum(math.prod(shape) for name, shape in tensors.items() if EXPERTS in name)


def trained_elements(config: BailingMoeV2Config, part: str) -> int:
    """Numbers that learn, of the layer or beside it.

    Args:
        part: "whole", "attention" or "lora".
    """
    tensors = layer_tensors(config, config.num_hidden_layers)
    if part == "whole":
        return layer_elements(config)
    if part == "lora":
        return sum(LORA_RANK * sum(shape) for name, shape in tensors.items() if LORA.search(name))
    return sum(math.prod(shape) for name, shape in tensors.items() if ATTENTION.search(name))


def memory_needed(config: BailingMoeV2Config, has_gpu: bool, part: str = "whole", ranks: int = 1) -> Memory:
    """Weights, their gradients and moments, and logits: fp32 on a processor; on GPUs bf16 but for what is trained.

    Of each of several ranks: FSDP2 shards the layer with gradients and moments (ZeRO's third stage, 1910.02054), while
    embedding and head are whole. It gathers an expert at a time, whose gradient is kept until all draft steps are gone
    back through, and the rest of the layer with its gradient for the length of a step. On GPUs autocast keeps a rounded
    copy of each matrix in fp32, and of its gradient. What a batch needs within the layer comes on top.
    """
    size = 2 if has_gpu else 4
    main = sum(math.prod(shape) for shape in main_tensors(config).values())
    experts = expert_elements(config)
    rest = layer_elements(config) - experts
    layer = trained_elements(config, part) * TRAINED_BYTES + (0 if part == "whole" else experts * size + rest * 4)
    rounded = 2 * 2 if has_gpu else 0
    learning = experts if part == "whole" else 0
    gathered = (learning + rest) * rounded if ranks == 1 else rest * (8 + rounded) + learning * size
    vocabulary = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    logits = LOSS_ROWS * config.vocab_size * LOGIT_COPIES * 4
    return Memory(main * size, math.ceil(layer / ranks) + gathered + vocabulary * size + logits)


def active_elements(config: BailingMoeV2Config, layers: range) -> int:
    """Numbers of the matrices that a token is multiplied by in these layers."""
    total = 0.0
    for layer in layers:
        for name, shape in layer_tensors(config, layer).items():
            share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
            total += math.prod(shape) * share * (len(shape) == 2)
    return round(total)


def plan_training(
    config: BailingMoeV2Config, gpu: Gpu, gpus: int, answers: int, length: int, answer_length: int, draft_tokens: int
) -> TrainingPlan:
    """The plan for `answers` of `length` tokens with their prompts, `answer_length` of them the target's.

    FLOPs of a token: 2 for each active number forward, 4 backward (Kaplan et al., 2001.08361, section 2.1). Of the
    head, for each draft step: draft, its repetition while going back, its gradient, and the target's own: 8 H V.
    """
    tokens, parts = answers * length, ("whole", "attention", "lora")
    memory = {part: memory_needed(config, True, part) for part in parts}
    sharded = {part: memory_needed(config, True, part, gpus) for part in parts}
    peak = (gpu.flops_16 or math.inf) * UTILIZATION
    main = active_elements(config, range(config.num_hidden_layers))
    layer = active_elements(config, range(config.num_hidden_layers, config.num_hidden_layers + 1))
    head = 8 * config.hidden_size * config.vocab_size * answers * answer_length
    tp = max((n for n in range(1, gpus + 1) if not tp_obstacle(config, n)), default=1)
    speed = bound(Layout(config, "bf16", tp=tp), (config.num_hidden_layers,), gpu, length, _ANSWERED_AT_ONCE)
    train_hours = draft_tokens * (6 * layer * tokens + head) / peak / 3600
    record_fits = memory["whole"].record <= gpus * gpu.memory_bytes
    return TrainingPlan(
        tokens,
        tokens * config.hidden_size * STATE_BYTES,
        memory,
        record_fits,
        {part: memory[part].train <= gpu.memory_bytes for part in parts},
        sharded,
        {part: sharded[part].train <= gpu.memory_bytes for part in parts},
        answers * answer_length / speed.tokens_per_s / 3600 if record_fits else None,
        2 * main * tokens / peak / 3600,
        train_hours,
        train_hours / gpus,
    )
