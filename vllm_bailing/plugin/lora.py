"""LoRA adapters: which modules of this architecture take them, and a refusal of those that nothing would apply.

Names in an adapter are those of the checkpoint, as PEFT and LLaMA-Factory write them.
"""

from __future__ import annotations

from typing import Any

from vllm_bailing.errors import AdapterError
from vllm_bailing.plugin.patches import refuse_partial_adapters

EXPERTS = "experts"
# Every linear layer but the router, which PEFT cannot adapt and which stays fp32.
LINEAR = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj", EXPERTS)
# On demand: vLLM's wrapper of the head fails on prompt log-probabilities, and a draft shares both layers.
ENDS = ("embed_tokens", "lm_head")
_SHOWN = 3
_NO_EXPERTS_ON_CPU = (
    "vLLM's CPU build has no expert kernel that takes adapters; use a GPU, merge the adapter into the checkpoint, or "
    "train one without the experts"
)


def settle_lora_targets(lora_config: Any, on_cpu: bool, has_draft: bool) -> None:
    """Let vLLM prepare the modules of this architecture that can be adapted, if the user did not choose them.

    Raises:
        AdapterError: If the user chose experts on a CPU, or embedding or head beside a draft that shares them.
    """
    chosen = lora_config.target_modules
    if chosen is None:
        lora_config.target_modules = [name for name in LINEAR if not (on_cpu and name == EXPERTS)]
        return
    if on_cpu and EXPERTS in chosen:
        raise AdapterError(f"--lora-target-modules {EXPERTS}: {_NO_EXPERTS_ON_CPU}")
    shared = [name for name in ENDS if name in chosen]
    if has_draft and shared:
        raise AdapterError(
            f"--lora-target-modules {' '.join(shared)}: the draft model of --speculative-config shares these layers "
            "and takes no adapters; leave one of the two out"
        )


class RejectsPartialAdapters:
    """Mixin of a model that refuses adapters of which vLLM would silently drop a part."""

    # vLLM's adapter manager introduces itself to the model by this attribute, once its modules are prepared.
    @property
    def lora_manager(self) -> Any:
        return self.__dict__.get("_lora_manager")

    @lora_manager.setter
    def lora_manager(self, manager: Any) -> None:
        self.__dict__["_lora_manager"] = manager
        refuse_partial_adapters(manager, refuse_dropped_modules)


def refuse_dropped_modules(manager: Any, adapter: Any) -> None:
    """Compare the modules of a vLLM `LoRAModel` with those that the manager prepared.

    Raises:
        AdapterError: Naming the first few modules that nothing would apply, and what to do.
    """
    prepared = set(manager.modules).union(*manager.packed_modules.values())
    dropped = sorted(set(adapter.loras) - prepared)
    if not dropped:
        return
    names = f"{', '.join(dropped[:_SHOWN])}{', ...' if len(dropped) > _SHOWN else ''}"
    kinds = {EXPERTS if f".{EXPERTS}." in name else name.rpartition(".")[2] for name in dropped}
    absent = sorted(kinds - set(manager.lora_config.target_modules))
    if kinds == {EXPERTS} and manager.device.type == "cpu":
        how = _NO_EXPERTS_ON_CPU
    elif absent:
        how = (
            f"start the server with --lora-target-modules {' '.join([*manager.lora_config.target_modules, *absent])}, "
            "if the model has them"
        )
    else:
        how = "the model has no such modules; check that the adapter was trained on it"
    raise AdapterError(f"the adapter has {len(dropped)} module(s) that would be ignored ({names}): {how}")
