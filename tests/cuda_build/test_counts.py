"""How many kernels a step of decoding launches, with vLLM's own class and with ours: for docs/gpu-expectations.md."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest

from tests.cuda_build import counting, fakes
from tests.cuda_build.deployments import FLASH, FP8_BLOCK, MINI, TP4
from tests.cuda_build.records import record, recorded
from tests.support.paths import DATA
from vllm_bailing.bench.statistics import IN_TREE, PLUGIN

RECORDED = DATA / "gpu_counts.json"
BATCHES = (1, 8, 64)
COUNTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mini, TP 1": (MINI, {}),
    "flash, TP 4": (FLASH, TP4),
    "flash, fp8 blocks, TP 1": (FP8_BLOCK, {}),
}


def _use_vllms_own_class() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.bailing_moe import BailingMoeV2ForCausalLM

    ModelRegistry.register_model("BailingMoeV2ForCausalLM", BailingMoeV2ForCausalLM)


def _of_layers(layers: int, name: str, options: dict[str, Any]) -> tuple[Counter[str], dict[str, Any]]:
    """Calls in the generated code of a model with so many layers, and what its last layer's experts call."""
    from vllm.compilation import backends

    from vllm_bailing.bench.worker_extension import FactsExtension

    graphs = []

    def record(self: Any, graph: Any, inputs: Any) -> Any:
        graphs.append(counting.generated(graph, inputs, self.vllm_config))
        return graph

    config = fakes.engine_config(name, {"num_hidden_layers": layers}, distributed_executor_backend="mp", **options)
    with mock.patch.object(backends.VllmBackend, "__call__", record), fakes.on_gpus(config) as built:
        fakes.forward(built)
        worker: Any = FactsExtension()
        worker.vllm_config, worker.get_model, worker.model_runner = config, lambda: built.model, None
        facts = worker.bailing_facts()
        last = built.model.model.layers[-1]
        with counting.routed() as routed:
            experts = {str(batch): dict(counting.inside_experts(built, last, batch)) for batch in BATCHES}
        found = {
            "runs": {key: facts[key] for key in ("model", "experts", "attention")},
            "router": str(last.mlp.gate.weight.dtype).removeprefix("torch."),
            "routed": " ".join(sorted(routed)),
            "experts": experts,
        }
    (graph,) = graphs
    return graph, found


def counted(arm: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """`layer`: calls of an MoE layer outside its experts; `rest`: of all else, embedding, dense layer and last norm."""
    if arm == IN_TREE:
        _use_vllms_own_class()
    fewer, _ = _of_layers(2, name, options)
    more, found = _of_layers(3, name, options)
    layer = more - fewer
    return {**found, "layer": dict(sorted(layer.items())), "rest": dict(sorted((fewer - layer).items()))}


@pytest.mark.parametrize("arm", [IN_TREE, PLUGIN])
@pytest.mark.parametrize("title", COUNTED)
def test_a_step_launches_what_was_recorded(title, arm, gpu, vllm_version, forked, pytestconfig):
    if gpu not in ("H100", "B200"):
        pytest.skip("counted for H100 and B200")
    row = recorded(RECORDED, vllm_version, gpu).get(title, {})
    is_recording = pytestconfig.getoption("--write-kernels")
    if arm not in row and not is_recording:
        pytest.skip("nothing is recorded for this release yet; --write-kernels records it")
    found = forked(counted, arm, *COUNTED[title])
    assert found["runs"]["model"].startswith("vllm." if arm == IN_TREE else "vllm_bailing.")
    # fp32 from the gate to the weights of the experts, or to the logits by which TRT-LLM's choose.
    routed = found.pop("routed")
    assert arm == IN_TREE or routed in ("float32 weights", "float32 logits")
    if is_recording:
        row[arm] = found
        record(RECORDED, vllm_version, gpu, title, row)
    assert found == row[arm], "other counts than recorded; if that is right, add --write-kernels"
