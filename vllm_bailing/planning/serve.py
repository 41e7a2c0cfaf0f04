"""What `vllm serve` is given: flags, environment, the command, and a file for `--config`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_bailing.adapters import LINEAR
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.gpus import Gpu
from vllm_bailing.planning.memory import Layout, plain_dtype, stored_dtype, vllm_partition
from vllm_bailing.tools.shell import laid_out, servable
from vllm_bailing.units import GIB, PLAIN_DTYPES

if TYPE_CHECKING:
    from vllm_bailing.planning.request import Request

MEMORY_UTILIZATION = 0.92  # vLLM's own default
COLUMNS = 100  # of a command
SHUTDOWN_TIMEOUT = 60  # seconds for answers that are under way when a server is told to stop; vLLM's default is none
FIRST_PORT = 8000  # of the first replica on a node, vLLM's own default
_PARSERS = {"enable-auto-tool-choice": True, "tool-call-parser": "bailing", "reasoning-parser": "bailing"}


def default_batched_tokens(gpu: Gpu) -> int:
    """Tokens of the biggest step unless a flag says otherwise. Source: vLLM, `EngineArgs.get_batch_defaults`."""
    if gpu.memory_bytes >= 160 * GIB:
        return 16384
    is_a100 = any("a100" in name.lower() for name in (gpu.name, *gpu.driver_names))
    return 8192 if gpu.memory_bytes >= 70 * GIB and not is_a100 else 2048


@dataclass(frozen=True)
class Command:
    """What one `vllm serve` of a deployment is given besides what all of them are.

    Attributes:
        node: Number of its node.
        replica: Number of its replica.
        environment: Variables.
        flags: Flags, as in a `Plan`.
    """

    node: int
    replica: int
    environment: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)

    def place(self, commands: Sequence[Command]) -> str:
        """Where it runs and as which one, among all `commands`."""
        replicas = len({command.replica for command in commands})
        return f"node {self.node}" + (f", replica {self.replica}" if replicas > 1 else "")

    def additions(self) -> str:
        """Variables and flags, as they are typed."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, *(word for item in self.flags.items() for word in _words(*item))])


def commands(layout: Layout, gpus: int, nodes: int) -> tuple[Command, ...]:
    """Every `vllm serve` of a layout on `nodes` nodes of `gpus` GPUs, node by node.

    HOST0, HOST1 and so on stand for the addresses of nodes.
    """
    if layout.ranks <= gpus:
        on_a_node = gpus // layout.ranks
        return tuple(
            Command(
                node,
                node * on_a_node + slot,
                {"CUDA_VISIBLE_DEVICES": ",".join(str(slot * layout.ranks + rank) for rank in range(layout.ranks))},
                {"port": FIRST_PORT + slot},
            )
            if on_a_node > 1
            else Command(node, node)
            for node in range(nodes)
            for slot in range(on_a_node)
        )
    span = layout.ranks // gpus
    return tuple(Command(node, node // span, {}, _node_flags(layout, span, node % span, node)) for node in range(nodes))


def _node_flags(layout: Layout, span: int, rank: int, node: int) -> dict[str, Any]:
    """Flags of the node that is number `rank` of the `span` nodes of a replica."""
    head = f"HOST{node - rank}"
    if layout.dp > 1:
        local = layout.dp // span
        chosen: dict[str, Any] = {"data-parallel-size-local": local, "data-parallel-address": head}
        return chosen | ({"data-parallel-start-rank": rank * local, "headless": True} if rank else {})
    chosen = {"nnodes": span, "node-rank": rank, "master-addr": head}
    return chosen | ({"headless": True} if rank else {})


def requests_of_an_engine(request: Request, layout: Layout) -> int:
    """Requests at once of the engine that has most of them."""
    return -(-request.concurrency // layout.engines)


def flags(config: BailingMoeV2Config, request: Request, layout: Layout, yarn_factor: float | None) -> dict[str, Any]:
    """Flags of `vllm serve` without their dashes, as in a `Plan`.

    Args:
        request: A request in which nothing is left open.
        yarn_factor: Factor that stretches the window over the context; None without one.
    """
    chosen: dict[str, Any] = {"model": servable(request.model or "MODEL"), "tensor-parallel-size": layout.tp}
    if layout.pp != 1:
        chosen["pipeline-parallel-size"] = layout.pp
    if layout.dp != 1:
        chosen["data-parallel-size"] = layout.dp
    if layout.expert_parallel:
        chosen["enable-expert-parallel"] = True
    if layout.redundant_experts:
        chosen |= {"enable-eplb": True, "eplb-config": _json({"num_redundant_experts": layout.redundant_experts})}
    chosen |= {"max-model-len": request.context, "max-num-seqs": requests_of_an_engine(request, layout)}
    if request.max_num_batched_tokens != default_batched_tokens(request.gpu):
        chosen["max-num-batched-tokens"] = request.max_num_batched_tokens
    if request.memory_utilization != MEMORY_UTILIZATION:
        chosen["gpu-memory-utilization"] = request.memory_utilization
    if request.dtype in PLAIN_DTYPES and request.dtype != plain_dtype(config):
        chosen["dtype"] = PLAIN_DTYPES[request.dtype]
    if request.dtype == "fp8" and stored_dtype(config) in PLAIN_DTYPES:
        chosen["quantization"] = "fp8"  # while loading
    if request.kv_dtype != "auto":
        chosen["kv-cache-dtype"] = request.kv_dtype
    if overrides := _config_overrides(config, request, yarn_factor):
        chosen["hf-overrides"] = _json(overrides)
    if request.draft_tokens:
        model = {"model": request.draft_model} if request.draft_model else {}
        chosen["speculative-config"] = _json({"method": "mtp", **model, "num_speculative_tokens": request.draft_tokens})
    if request.max_loras:
        chosen |= {"enable-lora": True, "max-loras": request.max_loras, "max-lora-rank": request.max_lora_rank}
        if set(request.lora_target_modules) != set(LINEAR):  # which is what it fills in
            chosen["lora-target-modules"] = list(request.lora_target_modules)
    return chosen | _PARSERS


def _config_overrides(config: BailingMoeV2Config, request: Request, yarn_factor: float | None) -> dict[str, Any]:
    """Keys of config.json that have to be other than they are stored."""
    overrides: dict[str, Any] = {}
    is_quantized = stored_dtype(config) not in PLAIN_DTYPES or config.stored_quantization_config
    if request.dtype in PLAIN_DTYPES and is_quantized:
        overrides["dequantize"] = True
    if yarn_factor:
        window = config.max_position_embeddings
        overrides["rope_scaling"] = {"type": "yarn", "factor": yarn_factor, "original_max_position_embeddings": window}
    return overrides


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def environment(partition: tuple[int, ...]) -> dict[str, str]:
    """Variables that `vllm serve` needs for pipeline stages of `partition` layers each."""
    if partition == vllm_partition(sum(partition), len(partition)):
        return {}
    return {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, partition))}


def serve_line(model: str, flags: dict[str, Any], environment: dict[str, str], columns: int = COLUMNS) -> str:
    """The command, quoted for a shell, in lines of so many columns unless one value is longer."""
    words = [*(f"{name}={value}" for name, value in environment.items()), "vllm", "serve"]
    parts = [[*words, shlex.quote(model)]]
    for name, value in flags.items():
        if name != "model":
            parts.append(_words(name, value))
    return laid_out(parts, columns)


def _words(name: str, value: Any) -> list[str]:
    """A flag with its values, quoted for a shell."""
    values = [] if value is True else value if isinstance(value, list) else [value]
    return [f"--{name}", *(shlex.quote(str(one)) for one in values)]


def config_file(flags: dict[str, Any], environment: dict[str, str], comments: Iterable[str]) -> str:
    """Text of a file for `vllm serve --config FILE`, `comments` first; a server of it finishes its answers."""
    import yaml

    lines = list(comments)
    if environment:
        lines.append("Set " + " and ".join(f"{name}={value}" for name, value in environment.items()) + ".")
    header = "".join(f"# {line}\n" for line in lines)
    return header + yaml.safe_dump({**flags, "shutdown-timeout": SHUTDOWN_TIMEOUT}, sort_keys=False, width=1000)
