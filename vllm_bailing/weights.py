"""Which tensors a BailingMoeV2 checkpoint holds, and the account of what became of each while loading.

No nn.Module and no vLLM in here: names and shapes follow from the configuration alone.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_bailing.config import BailingMoeV2Config

Shape = tuple[int, ...]
# Buffers that some exporters write; they are computed from the configuration.
_COMPUTED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_KV_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")
_SHOWN = 4


class CheckpointError(ValueError):
    """The checkpoint does not fit its configuration."""


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def layer_tensors(config: BailingMoeV2Config, layer: int) -> dict[str, Shape]:
    """Names and shapes of one decoder layer, `layer` counted over main and MTP layers."""
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
        tensors[f"{prefix}.mlp.gate.weight"] = (config.num_experts, hidden)
        tensors[f"{prefix}.mlp.gate.expert_bias"] = (config.num_experts,)
        for expert in range(config.num_experts):
            tensors.update(_mlp(f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size))
        if config.num_shared_experts:
            tensors.update(_mlp(f"{prefix}.mlp.shared_experts", hidden, config.shared_expert_intermediate_size))
    if layer >= config.num_hidden_layers:
        for norm in ("enorm", "hnorm", "final_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = (hidden,)
        tensors[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
    return tensors


def main_tensors(config: BailingMoeV2Config) -> dict[str, Shape]:
    """Names and shapes of everything but the MTP layers."""
    vocab = (config.vocab_size, config.hidden_size)
    tensors: dict[str, Shape] = {"model.word_embeddings.weight": vocab, "model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = vocab
    for layer in range(config.num_hidden_layers):
        tensors.update(layer_tensors(config, layer))
    return tensors


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None."""
    parts = name.split(".", 3)
    return int(parts[2]) if name.startswith("model.layers.") and parts[2].isdigit() else None


class Audit:
    """Passes a checkpoint's tensors on to a loader, and accounts for every one of them.

    A tensor is loaded, or skipped by a rule named in `skip_rule`, or held back and reported. Only names and shapes are
    looked at: no byte of a tensor is read here.

    Args:
        config: The model's configuration.
        expected: Names and shapes that this model loads.
        quantized: Whether the checkpoint has a quantisation config; then a linear layer may store its weight under
            other names and in packed shapes, which vLLM's quantisation method checks.
        folder: Where the checkpoint's files lie, for a better message; may be None or not exist.
        may_lack_experts: Whether another rank may hold whole experts (expert parallelism).
    """

    def __init__(
        self,
        config: BailingMoeV2Config,
        expected: dict[str, Shape],
        quantized: bool = False,
        folder: str | None = None,
        may_lack_experts: bool = False,
    ) -> None:
        self.config, self.expected, self.quantized = config, expected, quantized
        self.folder, self.may_lack_experts = folder, may_lack_experts
        self.seen: set[str] = set()
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.stray_layers: set[int] = set()

    def skip_rule(self, name: str) -> str | None:
        """Why `name` is not loaded although nothing is wrong with it, or None."""
        if layer_of(name) in self.config.mtp_layer_ids and name not in self.expected:
            return "MTP layers are the draft model's"
        if name.endswith(_COMPUTED_SUFFIXES):
            return "rotary tables are computed"
        if name.startswith("lm_head.") and self.config.tie_word_embeddings:
            return "the head is the embedding"
        return None

    def passed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of `weights` that are to be loaded."""
        iterator = iter(weights)
        while True:
            try:
                name, tensor = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                if cause := damaged_files(self.folder):
                    raise CheckpointError(f"the checkpoint cannot be read: {cause}") from error
                raise
            if self.skip_rule(name) is None and self._accepts(name, tensor):
                yield name, tensor

    def _accepts(self, name: str, tensor: torch.Tensor) -> bool:
        shape = tuple(tensor.shape)
        wanted = self.expected.get(name)
        if wanted is not None:
            self.seen.add(name)
            packed = self.quantized and not tensor.is_floating_point()
            if shape == wanted or packed:
                return True
            self.misshapen.append(f"{name} is {list(shape)}, config.json asks for {list(wanted)}")
            return False
        module, _, leaf = name.rpartition(".")
        if self.quantized and leaf in _KV_SCALES and ".attention" in module:
            return True
        if self.quantized and f"{module}.weight" in self.expected:
            if leaf in ("qweight", "weight_packed"):
                self.seen.add(f"{module}.weight")
            return True
        layer = layer_of(name)
        if layer is not None and layer >= self.config.num_hidden_layers:
            self.stray_layers.add(layer)
        self.unexpected.append(name)
        return False

    def missing(self) -> list[str]:
        """Expected tensors that did not come."""
        absent = [name for name in self.expected if name not in self.seen]
        if not self.config.moe_router_enable_expert_bias:
            absent = [name for name in absent if not name.endswith(".gate.expert_bias")]
        if self.may_lack_experts:
            here = {name.split(".")[5] for name in self.seen if ".mlp.experts." in name}
            absent = [name for name in absent if ".mlp.experts." not in name or name.split(".")[5] in here]
        return absent

    def finish(self, complete: bool = True) -> None:
        """Report what was found.

        Args:
            complete: Whether all tensors were to come; False where a trainer sends them in portions.
        Raises:
            CheckpointError: One message naming the first few missing, unexpected and misshapen tensors, and the cause.
        """
        missing = self.missing() if complete else []
        if not (missing or self.unexpected or self.misshapen):
            return
        parts = [
            f"{len(found)} {title} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
            for title, found in (
                ("missing", missing),
                ("unexpected", self.unexpected),
                ("of the wrong shape", self.misshapen),
            )
            if found
        ]
        raise CheckpointError(
            f"the checkpoint does not fit its config.json: {'; '.join(parts)}. {self._cause(missing)}"
        )

    def _cause(self, missing: list[str]) -> str:
        if damage := damaged_files(self.folder):
            return f"Likely cause: {damage}"
        if self.stray_layers:
            layers = len(self.stray_layers)
            return (
                f"Likely cause: there are {layers} layer(s) behind num_hidden_layers={self.config.num_hidden_layers}, "
                f"but num_nextn_predict_layers={self.config.num_nextn_predict_layers}; if they are MTP layers, set "
                f"num_nextn_predict_layers to {layers} in config.json or by --hf-overrides"
            )
        if missing and self.unexpected:
            # Names close to a missing one were most likely meant to be it.
            close = difflib.get_close_matches(self.unexpected[0], missing[:2000], n=1, cutoff=0.6)
            if close:
                return f"Likely cause: {self.unexpected[0]} should be called {close[0]}"
        if self.misshapen:
            return "Likely cause: config.json belongs to another model size; take it from the same place as the weights"
        if missing:
            return "Likely cause: an incomplete download or export; fetch or export the checkpoint again"
        return "Likely cause: weights of another architecture or adapter tensors; remove them from the checkpoint"


def damaged_files(folder: str | None) -> str:
    """What is wrong with a checkpoint's files as a whole: absent or cut off. Empty if nothing was found."""
    root = Path(folder) if folder else None
    if root is None or not root.is_dir():
        return ""
    index = root / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            return f"{index} is not a readable index; fetch it again"
        absent = [name for name in listed if not (root / name).is_file()]
        if absent:
            return f"{len(absent)} of {len(listed)} files of the index are not in {root}, first {absent[0]}; fetch them"
    for file in sorted(root.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{file} is cut off or damaged ({file.stat().st_size} bytes; {error}); fetch it again"
    return ""
