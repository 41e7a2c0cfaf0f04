"""What the package repeats of vLLM, since commands do without it, against vLLM's own lists and functions."""

from __future__ import annotations

from tests.support.checkpoints import small_config
from vllm_bailing.adapters import TARGETS, AdapterSlots, adaptable, is_prepared, name_in_vllm
from vllm_bailing.tools import doctor


def test_ranks_are_those_of_vllm():
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from vllm_bailing.planning.request import LORA_RANKS, Request

    assert get_args(MaxLoRARanks) == LORA_RANKS
    assert Request.max_lora_rank == AdapterSlots(()).rank == 16


def test_names_and_targets_are_vllms():
    """Its own function decides, for every module and every kind of target."""
    from vllm.lora.utils import is_in_target_modules

    packed = {"gate_up_proj": ["gate_proj", "up_proj"], "query_key_value": ["query_key_value"]}
    packed["experts"] = [f"experts.{e}.{p}" for e in range(16) for p in ("gate_proj", "down_proj", "up_proj")]
    modules = adaptable(small_config())
    whole = ("model.layers.1.mlp.experts", "model.layers.0.mlp.gate_up_proj", "model.layers.2.attention.dense")
    for target in (*TARGETS, "gate_up_proj", *whole):
        wanted = {name for name in modules if is_in_target_modules(name_in_vllm(name), [target], packed)}
        assert {name for name in modules if is_prepared(name, [target])} == wanted != set(), target


def test_schemes_are_those_that_vllm_lists():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    assert doctor._vllm_schemes() == {*QUANTIZATION_METHODS}
