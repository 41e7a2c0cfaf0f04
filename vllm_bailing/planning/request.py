"""What is asked of the planner, and whether it makes sense for the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_bailing.adapters import ENDS, LINEAR, TARGETS
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.gpus import Gpu, find_gpu
from vllm_bailing.planning.memory import DTYPES, KV_DTYPES, stored_dtype
from vllm_bailing.planning.serve import MEMORY_UTILIZATION
from vllm_bailing.units import PLAIN_DTYPES, short_dtype

GOALS = ("throughput", "latency")
GPUS_OF_A_NODE = 8  # at most, unless the request says otherwise
MAX_NUM_BATCHED_TOKENS = 8192
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM, `MaxLoRARanks`
_YARN_FACTOR, _YARN_WINDOW = 4.0, 131072  # model card of Ling-flash-2.0; no card promises a longer window


@dataclass(frozen=True)
class Request:
    """What is to be served, and on what.

    Attributes:
        gpu: A row of `GPUS`, a GPU described by `find_gpu`, or the name of a row.
        gpus: Number of GPUs of each node; more than 8 are taken for nodes of 8 if `nodes` is left out.
        context: Tokens of one request, prompt and answer.
        concurrency: Requests at once.
        dtype: Data type of the weights, one of `DTYPES` or "bfloat16", "float16", "float32"; the checkpoint's own if
            left out.
        kv_dtype: Data type of the KV cache: "auto" (as the activations) or "fp8".
        draft_tokens: Tokens that the MTP layer drafts per step; 0 leaves the layer out.
        tp: Tensor-parallel size.
        pp: Number of pipeline stages.
        memory_utilization: Share of each GPU's memory that vLLM may use.
        max_num_batched_tokens: Tokens of the biggest step.
        model: Name or folder of the model for `vllm serve`; by default where the configuration came from.
        draft_model: Checkpoint of the MTP layer, if the model's own has none.
        max_loras: LoRA adapters that one batch can use; 0 without adapters.
        max_lora_rank: The highest rank of an adapter, one that vLLM allows.
        lora_target_modules: What adapters may change, of `adapters.TARGETS`.
        nodes: Number of nodes; 1 if left out, or what `gpus` says.
        goal: One of `GOALS`, by which sizes of parallelism are chosen where they are left out.
        dp: Data-parallel size, with expert parallelism if it is above 1.
        expert_parallel: Whether experts are divided as wholes without data parallelism too.
        redundant_experts: Further copies of routed experts in each layer, over all ranks, for EPLB.
    """

    gpu: Gpu | str
    gpus: int
    context: int
    concurrency: int
    dtype: str | None = None
    kv_dtype: str = "auto"
    draft_tokens: int = 0
    tp: int | None = None
    pp: int | None = None
    memory_utilization: float = MEMORY_UTILIZATION
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    model: str | None = None
    draft_model: str | None = None
    max_loras: int = 0
    max_lora_rank: int = LORA_RANKS[2]
    lora_target_modules: tuple[str, ...] = LINEAR
    nodes: int | None = None
    goal: str = "throughput"
    dp: int | None = None
    expert_parallel: bool = False
    redundant_experts: int = 0

    @property
    def total_gpus(self) -> int:
        """GPUs over all nodes."""
        return self.gpus * (self.nodes or 1)


def settled(config: BailingMoeV2Config, request: Request) -> Request:
    """The request with nothing left open but the sizes of parallelism.

    Raises:
        ValueError: If it makes no sense. The message is one line: what was given, what is allowed, and what to do.
    """
    gpu = find_gpu(request.gpu) if isinstance(request.gpu, str) else request.gpu
    _check_numbers(request)
    dtype = _weight_dtype(stored_dtype(config), request.dtype)
    _check_kv_dtype(request.kv_dtype)
    _check_adapters(request)
    mtp_layers(config, request)
    yarn_factor(config, request.context)
    model = request.model or config.name_or_path or "MODEL"
    return replace(_on_nodes(request), gpu=gpu, dtype=dtype, model=model)


def _check_numbers(request: Request) -> None:
    for name, value, minimum in (
        ("gpus", request.gpus, 1),
        ("context", request.context, 1),
        ("concurrency", request.concurrency, 1),
        ("tp", 1 if request.tp is None else request.tp, 1),
        ("pp", 1 if request.pp is None else request.pp, 1),
        ("dp", 1 if request.dp is None else request.dp, 1),
        ("nodes", 1 if request.nodes is None else request.nodes, 1),
        ("redundant_experts", request.redundant_experts, 0),
        ("max_num_batched_tokens", request.max_num_batched_tokens, 1),
        ("draft_tokens", request.draft_tokens, 0),
        ("max_loras", request.max_loras, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}; give another")
    share = request.memory_utilization
    if not 0 < share <= 1:
        raise ValueError(f"memory_utilization={share} must be above 0 and at most 1, such as {MEMORY_UTILIZATION}")
    if request.goal not in GOALS:
        raise ValueError(f"goal={request.goal!r} is not known; use one of {', '.join(GOALS)}")


def _on_nodes(request: Request) -> Request:
    """The request with its GPUs on nodes."""
    if request.nodes is not None:
        return request
    if request.gpus <= GPUS_OF_A_NODE:
        return replace(request, nodes=1)
    if request.gpus % GPUS_OF_A_NODE:
        raise ValueError(
            f"gpus={request.gpus} are more than the {GPUS_OF_A_NODE} of a usual node and no whole number of such; give "
            "the GPUs of one node by --gpus and the number of nodes by --nodes"
        )
    return replace(request, gpus=GPUS_OF_A_NODE, nodes=request.gpus // GPUS_OF_A_NODE)


def _weight_dtype(stored: str, name: str | None) -> str:
    """Which of `DTYPES` the weights are served in."""
    if name is None:
        return stored
    dtype = short_dtype(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={name!r} is not known; use one of {', '.join(DTYPES)}")
    if dtype not in PLAIN_DTYPES and stored not in (*PLAIN_DTYPES, dtype):
        raise ValueError(
            f"dtype={name!r} cannot be made from a checkpoint in {stored}; use {stored}, or bf16, which dequantizes it"
        )
    return dtype


def _check_kv_dtype(kv_dtype: str) -> None:
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype={kv_dtype!r} is not known; use one of {', '.join(KV_DTYPES)}")


def _check_adapters(request: Request) -> None:
    if not request.max_loras:
        return
    if request.max_lora_rank not in LORA_RANKS:
        ranks = ", ".join(map(str, LORA_RANKS))
        raise ValueError(f"max_lora_rank={request.max_lora_rank} is none that vLLM allows; use one of {ranks}")
    targets = request.lora_target_modules
    if not targets or not set(targets) <= set(TARGETS):
        raise ValueError(f"lora_target_modules={' '.join(targets)!r} are not known; choose among {' '.join(TARGETS)}")
    if request.draft_tokens and not set(targets).isdisjoint(ENDS):
        raise ValueError(
            f"lora_target_modules={' '.join(targets)!r} with draft_tokens={request.draft_tokens}: drafts share "
            f"{' and '.join(ENDS)}, and take no adapters; leave one of the two out"
        )


def mtp_layers(config: BailingMoeV2Config, request: Request) -> int:
    """Number of MTP layers that draft."""
    if not request.draft_tokens:
        return 0
    layers = config.num_nextn_predict_layers or (1 if request.draft_model else 0)
    if not layers:
        raise ValueError(
            f"draft_tokens={request.draft_tokens} needs an MTP layer, and the model has num_nextn_predict_layers=0; "
            "name a checkpoint that has it by --draft-model, such as the base model of the same size, or leave drafts "
            "out"
        )
    return layers


def longest_window(config: BailingMoeV2Config) -> int:
    """Tokens that the model can be served with, by YaRN as on the model card if it has no scaling yet."""
    window = config.max_position_embeddings
    if config.rope_parameters["rope_type"] != "default":
        return window
    return max(window, min(int(_YARN_FACTOR * window), _YARN_WINDOW))


def yarn_factor(config: BailingMoeV2Config, context: int) -> float | None:
    """Factor that stretches the model's window over `context`; None if it is long enough."""
    window, longest = config.max_position_embeddings, longest_window(config)
    if context > longest:
        kind = config.rope_parameters["rope_type"]
        how = f"{longest} with YaRN" if longest > window else f"{window}, with rope_type={kind!r} in config.json"
        raise ValueError(
            f"context={context} is beyond the model's window of {window} tokens (at most {how}); give a context of "
            f"at most {longest}"
        )
    return longest / window if context > window else None
