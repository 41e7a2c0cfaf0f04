"""LoRA adapters: which modules of this architecture take them, and the room that vLLM sets aside for them.

Names in an adapter are those of the checkpoint, as PEFT and LLaMA-Factory write them. Whether the files of an adapter
fit a model: `adapter_audit.py`. No nn.Module and no vLLM in here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.tensor_names import EMBEDDING, ROUTER, Shape, layer_tensors, main_tensors, shard_shape

# What `--lora-target-modules` can name. By default every linear layer, but neither the router, which stays fp32, nor
# the routed experts: vLLM sets memory aside for each of them, and takes other kernels for all.
LINEAR = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj")
EXPERTS = "experts"
# On demand too: vLLM's wrapper of the head fails on prompt log-probabilities, and a draft shares both layers.
ENDS = ("embed_tokens", "lm_head")
TARGETS = (*LINEAR, EXPERTS, *ENDS)
EMBEDDING_MODULE = EMBEDDING.removesuffix(".weight")
_PACKED = ("gate_proj", "up_proj")  # one layer in vLLM
_PACK = "gate_up_proj"
_ROUTED = f".mlp.{EXPERTS}."


def is_routed(module: str) -> bool:
    """Whether `module` belongs to a routed expert."""
    return _ROUTED in module


def adaptable(config: BailingMoeV2Config) -> dict[str, Shape]:
    """Shape [out, in] of each module that takes an adapter, by its name in the checkpoint; of MTP layers none."""
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in main_tensors(config).items()
        if len(shape) == 2 and not name.endswith(ROUTER)
    }
    vocabulary, hidden = modules[EMBEDDING_MODULE]
    modules[EMBEDDING_MODULE] = (hidden, vocabulary)  # it multiplies one-hot vectors
    return modules


def target_of(module: str) -> str:
    """The name in `TARGETS` by which `module` is prepared; its own last part if there is none."""
    if is_routed(module):
        return EXPERTS
    return "embed_tokens" if module == EMBEDDING_MODULE else module.rpartition(".")[2]


def name_in_vllm(module: str) -> str:
    """Name of vLLM's layer that `module` is a part of."""
    if is_routed(module):
        return module.partition(_ROUTED)[0] + _ROUTED.rstrip(".")
    parent, _, leaf = module.rpartition(".")
    leaf = "embed_tokens" if module == EMBEDDING_MODULE else _PACK if leaf in _PACKED else leaf
    return f"{parent}.{leaf}" if parent else leaf


def is_prepared(module: str, targets: Iterable[str]) -> bool:
    """Whether vLLM prepares `module` for adapters, if it is given these targets.

    Source: vLLM, `lora.utils.is_in_target_modules`; besides the ends of names it takes whole ones.
    """
    layer = name_in_vllm(module)
    leaf = layer.rpartition(".")[2]
    return not {layer, leaf, *(_PACKED if leaf == _PACK else ())}.isdisjoint(targets)


def unknown_targets(config: BailingMoeV2Config, targets: Iterable[str]) -> list[str]:
    """Which of `targets` name nothing in the model that takes an adapter."""
    known = {*TARGETS, _PACK, *map(name_in_vllm, adaptable(config))}
    return [name for name in targets if name not in known]


@dataclass(frozen=True)
class AdapterSlots:
    """What vLLM sets aside on each GPU at the start: for all prepared modules, whether an adapter touches them or not.

    Source: vLLM, `create_lora_weights` of the classes in `lora/layers`.

    Attributes:
        targets: Of `TARGETS`, or whole names of vLLM's layers.
        count: Adapters that one batch can use.
        rank: The highest rank that is allowed.
        itemsize: Bytes of one element.
        tp: Tensor-parallel size.
        ep: Ranks that the experts are divided among as wholes; 1 if each is divided by `tp`.
        fully_sharded: Whether the other factor of each pair is divided too (`--fully-sharded-loras`).
    """

    targets: tuple[str, ...]
    count: int = 1
    rank: int = 16
    itemsize: int = 2
    tp: int = 1
    ep: int = 1
    fully_sharded: bool = False

    def layer_bytes(self, config: BailingMoeV2Config, layer: int) -> int:
        """Bytes of one decoder layer."""
        elements = 0
        for name, whole in layer_tensors(config, layer, experts=1).items():
            module, parts = name.removesuffix(".weight"), name.split(".")[3:]
            if len(whole) != 2 or name.endswith(ROUTER) or not is_prepared(module, self.targets):
                continue
            if not is_routed(module):
                elements += self._elements(whole, shard_shape(config, parts, whole, self.tp), self.tp)
            else:
                tp = self.tp if self.ep == 1 else 1
                elements += self._elements(whole, shard_shape(config, parts, whole, tp), tp) * (
                    config.num_experts // self.ep
                )
        return elements * self.count * self.itemsize

    def _elements(self, whole: Shape, shard: Shape, tp: int) -> int:
        """Elements of A [rank, in] and B [out, rank] of one layer on one of `tp` ranks."""
        (out_features, _), (rows, columns) = whole, shard
        rank = self.rank
        if self.fully_sharded and rows != out_features:  # divided by outputs: B is, and A by its rank
            rank //= tp
        elif self.fully_sharded:
            rows //= tp
        return rank * columns + rows * self.rank

    def embedding_bytes(self, config: BailingMoeV2Config) -> int:
        """Bytes of the embedding, which every rank of the first pipeline stage has whole."""
        return self._ends_bytes(config, "embed_tokens")

    def head_bytes(self, config: BailingMoeV2Config) -> int:
        """Bytes of the head, which every rank of the last pipeline stage has whole."""
        return self._ends_bytes(config, "lm_head")

    def _ends_bytes(self, config: BailingMoeV2Config, name: str) -> int:
        elements = self.rank * (config.vocab_size + config.hidden_size) if name in self.targets else 0
        return elements * self.count * self.itemsize
