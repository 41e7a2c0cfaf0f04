"""Weights on their way into a model: the checkpoint's at the start, a trainer's into the running engine.

A running engine keeps weights in the layouts of its kernels. vLLM's layerwise reload (`model_loader/reload`) gives each
layer fresh parameters in the checkpoint's layout, keeps what comes until a layer is complete, and turns the layer into
the tensors that its kernels use. What it leaves open is settled here: a part of a layer is joined with what the layer
holds, and an update that cannot be carried out is refused while the old weights are in place.

What trainers do and what they get: docs/weight-updates.md.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.platforms import current_platform

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.config import read_config
from vllm_bailing.dequantize import dequantized
from vllm_bailing.errors import CheckpointError, UpdateError, named
from vllm_bailing.layouts import as_published
from vllm_bailing.plugin.kernels.unpack import has_checkpoint_layout, in_checkpoint_layout
from vllm_bailing.plugin.patches import settle_partial_layers
from vllm_bailing.tensor_names import EMBEDDING, HEAD, fused_module
from vllm_bailing.units import GIB

logger = init_logger("vllm.plugins.bailing.weights")

Weights = Iterable[tuple[str, torch.Tensor]]
# Bytes of an update that are looked at before the first is loaded. A GPU's memory belongs to its KV cache.
_LOOK_AHEAD = {"cpu": GIB, "cuda": GIB // 8}
_SEND_THEM = "send them too (expert_bias is a buffer, which named_parameters() leaves out)"
_SAMPLES = 16  # about so many small tensors are looked at to tell whether a deep sleep discarded the weights


class WeightLoading:
    """Loads weights into one model, target or draft, and remembers what it has.

    Args:
        audit_of: Says which tensors belong to the model, once it is complete.
        load: Hands tensors, under their published names, to the model's parameters; returns the parameters' names.
    """

    def __init__(
        self,
        model: nn.Module,
        vllm_config: VllmConfig,
        audit_of: Callable[[], Audit],
        load: Callable[[Weights], set[str]],
    ) -> None:
        self.model, self.vllm_config, self._audit_of, self._load = model, vllm_config, audit_of, load
        # Dummy weights are replaced by trainers, and what they never send would be answered with.
        self.is_dummy = self.is_running = vllm_config.load_config.load_format == "dummy"
        self.has_update = False
        # From 0.32 on vLLM unsets tie_word_embeddings where a head is stored, and ties it again if that is the same.
        self._was_tied = getattr(vllm_config.model_config, "word_embeddings_untied_by_checkpoint", False)
        self._folder = vllm_config.model_config.model
        self._sent: dict[str, None] = {}  # by the update under way, in order
        self._why = "the model started with dummy weights"
        self._samples: list[tuple[torch.Tensor, torch.Tensor]] = []
        settle_partial_layers()

    @cached_property
    def audit(self) -> Audit:
        """Of the load that is under way, or the last one."""
        return self._audit_of()

    @cached_property
    def never_came(self) -> set[str]:
        """Tensors in whose place the model still has dummies, or what a deep sleep left."""
        return set(self.audit.restarted().missing()) if self.is_dummy else set()

    def load(self, weights: Weights) -> set[str]:
        """Load a checkpoint's tensors under their published names; returns the parameters that got something.

        The first call must bring everything, later ones (a trainer updates the model) may bring a part.

        Raises:
            CheckpointError: At the start, if the checkpoint does not fit the configuration.
            UpdateError: If an update does not fit. The old weights are in place then, unless the message denies it.
        """
        audit = self.audit = self.audit.restarted()
        # An update is read in portions, in which nothing tells what all of its names begin with.
        prefix = "" if self.is_running else Checkpoint.of(self.vllm_config.model_config).prefix
        weights = as_published(weights, audit.config, prefix)
        if audit.config.tie_word_embeddings or self._was_tied:
            weights = _with_one_head(weights)
        plain = dequantized(audit.needed(weights), audit.config, self.vllm_config.model_config.dtype)
        if self.is_running:
            return self._update(audit.passed(plain))
        start = time.perf_counter()
        loaded = self._load(audit.passed(plain))
        audit.finish()
        self.is_running = True
        self._take_samples()
        seconds, size = time.perf_counter() - start, sum(parameter.nbytes for parameter in self.model.parameters())
        logger.info(
            "This rank's %.2f GiB of weights took %.1f s (%.2f GB/s)", size / GIB, seconds, size / seconds / 1e9
        )
        return loaded

    def check_complete(self) -> None:
        """Refuse to answer with a model that has real weights only in part; called before every answer.

        Raises:
            UpdateError: If it started with dummy weights, and an update left some of them.
        """
        if self.has_update and self.never_came:
            raise UpdateError(f"{self._why}, and {named(sorted(self.never_came))} never came; {_SEND_THEM}")

    # ---- updates of the running model ---------------------------------------------------------------------------

    def _update(self, weights: Weights) -> set[str]:
        self._notice_deep_sleep()
        has_session = get_layerwise_info(self.model).can_load()  # of `reload_weights`, or a weight update session
        if not has_session:
            self._sent.clear()
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            in_place = not has_session and all(map(has_checkpoint_layout, self.model.modules()))
            if not has_session and not in_place:
                initialize_layerwise_reload(self.model)
            try:
                self._refuse_another_configuration()
                loaded = self._load(self._looked_at(weights))
                if not has_session and not in_place:
                    finalize_layerwise_reload(self.model, self.vllm_config.model_config)
            except Exception as error:
                raise self._taken_back(error, in_place) from error
        self.has_update = True
        self.never_came -= self.audit.seen
        if in_place:  # elsewhere vLLM's reload ends with `after_update`
            self._take_samples()
        self._folder = self.audit.folder = self.vllm_config.model_config.model
        return loaded

    def _looked_at(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `weights`, the first of them when all, or as many as may be held, were looked at."""
        held: deque[tuple[str, torch.Tensor]] = deque()
        names, size = set(self._sent), 0
        for name, tensor in weights:
            if name in names:
                raise UpdateError(f"{name} came twice in one update; send every tensor once")
            names.add(name)
            held.append((name, tensor))
            size += tensor.nbytes
            while size > _LOOK_AHEAD.get(tensor.device.type, 0):
                self.audit.finish(complete=False, what="the update does not fit the model")
                size -= held[0][1].nbytes
                yield self._sending(held)
        self.audit.finish(complete=False, what="the update does not fit the model")
        while held:
            yield self._sending(held)

    def _sending(self, held: deque[tuple[str, torch.Tensor]]) -> tuple[str, torch.Tensor]:
        name, tensor = held.popleft()
        self._sent[name] = None
        return name, tensor

    def end_update(self) -> None:
        """Settle the layers that did not come whole; vLLM's reload calls this before it processes them.

        Raises:
            UpdateError: If a layer's other parts cannot be had, or never came.
        """
        if not self._open_layers():
            return
        try:
            self._refuse_passed_by()
            partial = self._partial_modules()
            settled = [(_ancestor(path, partial), layer) for path, layer in self._open_layers() if _is_begun(layer)]
            stuck = {module for module, layer in settled if module and not _filled(layer)}
            if stuck:
                raise UpdateError(
                    f"{named(stuck)} came in part, and their weights are in a layout that nothing can be joined with; "
                    "send all tensors of such a module in one update"
                )
        except UpdateError as error:
            raise self._taken_back(error, in_place=False) from error
        for _, layer in self._open_layers():
            if not _is_begun(layer) and not isinstance(layer, Attention):
                _put_back(layer)  # vLLM would warn of every layer that an update leaves out
        self._sent.clear()

    def after_update(self) -> None:
        """On CPUs a head keeps a packed copy of its weight, of which vLLM does not know if it is the embedding's."""
        head: Any = getattr(self.model, "lm_head", None)
        embedding = getattr(getattr(self.model, "model", None), "embed_tokens", None)
        weight = getattr(head, "weight", None)
        if current_platform.is_cpu() and weight is not None and weight is getattr(embedding, "weight", None):
            head.quant_method.process_weights_after_loading(head)
        self._take_samples()

    def _take_samples(self) -> None:
        """Note some weights' present values: vLLM does not tell a model that its weights were discarded."""
        if self.vllm_config.model_config.enable_sleep_mode:
            # Of CPUs, packed weights leave empty ones.
            small = [one.detach() for one in self.model.parameters() if one.dim() == 1 and one.numel()]
            chosen = small[:: max(1, len(small) // _SAMPLES)]
            self._samples = [(one, one.to("cpu", copy=True)) for one in chosen]

    def _notice_deep_sleep(self) -> None:
        """Sleep of level 2 discards parameters, and vLLM puts buffers alone back: the update must bring all others."""
        if self._samples and not any(torch.equal(now.cpu(), then) for now, then in self._samples):
            self._samples = []
            self.never_came = {name for name in self.audit.restarted().missing() if not name.endswith(".expert_bias")}
            self._why = "the weights were discarded when the engine slept (level 2)"

    def _open_layers(self) -> list[tuple[str, nn.Module]]:
        """Layers that wait for weights, with their paths."""
        return [(path, layer) for path, layer in self.model.named_modules() if get_layerwise_info(layer).can_load()]

    @cached_property
    def _members(self) -> dict[str, set[str]]:
        """The tensors of each module of the model."""
        members: dict[str, set[str]] = {}
        for name in self.audit.expected:
            members.setdefault(fused_module(name), set()).add(name)
        return members

    def _partial_modules(self) -> set[str]:
        """Modules of which the update brought some tensors, but not all."""
        sent = self._sent.keys()
        return {module for name in sent if not self._members.get(module := fused_module(name), set()) <= sent}

    def _refuse_passed_by(self) -> None:
        """Refuse an update that brought the first real weights of a module but one, and went on to other modules."""
        if not self.never_came or not self._sent:
            return
        begun = {fused_module(name) for name in self._sent} - {fused_module(next(reversed(self._sent)))}
        lacking = [name for name in self.never_came - self._sent.keys() if fused_module(name) in begun]
        if lacking:
            raise UpdateError(
                f"{named(sorted(lacking))} never had a value: {self._why}, and the update has only other tensors of "
                f"the same module; {_SEND_THEM}"
            )

    def _refuse_another_configuration(self) -> None:
        """vLLM's `reload_weights(weights_path=...)` reads the tensors of another folder, not its config.json."""
        model_config = self.vllm_config.model_config
        folder = str(model_config.model)
        if folder == self._folder:
            return
        different = _differing_keys(self._folder, folder)
        if different:
            raise UpdateError(
                f"the config.json of {folder} has other values of {', '.join(different)} than the running model's; "
                "start another engine with it"
            )

    def _taken_back(self, error: Exception, in_place: bool) -> Exception:
        """Give the layers that the update has not replaced their tensors back; returns what to raise for `error`."""
        infos = [get_layerwise_info(layer) for layer in self.model.modules()]
        is_mixed = bool(self._sent) if in_place else not all(info.can_load() for info in infos)
        for layer in self.model.modules():
            _put_back(layer)
        self._sent.clear()
        finalize_layerwise_reload(self.model, self.vllm_config.model_config)
        self.vllm_config.model_config.model = self._folder
        if not is_mixed:
            return error
        return UpdateError(
            f"{str(error).rstrip('.')}. A part of the update was in place before this was seen: send the whole model "
            "again before you ask it anything"
        )


def _with_one_head(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `weights` of a model whose head is its embedding; refuse another head beside it."""
    first: torch.Tensor | None = None
    for name, tensor in weights:
        if name in (EMBEDDING, HEAD):
            if first is not None and not torch.equal(tensor, first):
                raise CheckpointError(
                    "tie_word_embeddings=true in config.json, but lm_head.weight is there and differs from the "
                    "embedding; set it to false, or remove lm_head.weight"
                )
            first = tensor
        yield name, tensor


def _is_begun(layer: nn.Module) -> bool:
    return get_layerwise_info(layer).load_numel > 0


def _put_back(layer: nn.Module) -> None:
    info = get_layerwise_info(layer)
    if info.can_load():
        if info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
        info.reset()


def _filled(layer: nn.Module) -> bool:
    """Give the parameters of `layer`, of which an update brings a part, their present values; False if unknown."""
    info = get_layerwise_info(layer)
    assert info.kernel_tensors is not None
    values = in_checkpoint_layout(layer, info.restore_metadata[0], info.kernel_tensors[0])
    if values is None:
        return False
    stored, kept = info.restore_metadata[1], info.kernel_tensors[1]  # buffers, which no kernel repacks
    values |= {name: kept[name] for name in stored if name in kept}
    for name, value in values.items():
        tensor = materialize_meta_tensor(getattr(layer, name))
        tensor.data.copy_(value)
        setattr(layer, name, tensor)
    return True


def _ancestor(path: str, modules: set[str]) -> str:
    """The one of `modules` that the module at `path` is or belongs to; empty if there is none."""
    path = path.replace(".base_layer", "")  # adapters wrap the layers that they change
    return next((module for module in modules if path == module or path.startswith(f"{module}.")), "")


# Of one configuration and not of its model: who wrote it, what a generation starts and ends with.
_NOT_OF_THE_MODEL = ("architectures", "dtype", "model_type", "transformers_version", "initializer_range", "use_cache")
_NOT_OF_THE_MODEL += ("eos_token_id", "pad_token_id", "bos_token_id", "_name_or_path")


def _differing_keys(model: str | Path, other: str | Path) -> list[str]:
    """Keys of two folders' config.json that describe different models; none where one of them cannot be read."""
    try:
        one, two = (read_config(where).to_dict() for where in (model, other))
    except ValueError:
        return []
    keys = sorted(one.keys() | two.keys())
    return [key for key in keys if key not in _NOT_OF_THE_MODEL and one.get(key) != two.get(key)]
