"""The router on vLLM: the gate's projection, and the rule by which vLLM's runner chooses and weights experts.

The rule itself, line by line as in the official code, is `grouped_topk` and `BailingMoeV2Gate.forward` in
`reference_layers.py`, which the tests hold against this file.

Dimension letters: T tokens of all requests, H hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import CheckpointError
from vllm_bailing.plugin.kernels.cpu_router import multiplies_gate, routing_function
from vllm_bailing.plugin.options import FP32_ROUTER, keeps_fp32_router

logger = init_logger("vllm.plugins.bailing.router")


def routing_rule(config: BailingMoeV2Config, gate: BailingMoeV2Gate, vllm_config: VllmConfig) -> dict[str, Any]:
    """Arguments of vLLM's `FusedMoEFactory`: group-limited top-k of sigmoid scores, whose bias only the choice sees."""
    own = routing_function(vllm_config, config, gate.expert_bias)
    return {
        "scoring_func": "sigmoid",
        "use_grouped_topk": own is None,
        "custom_routing_function": own,
        "e_score_correction_bias": gate.expert_bias,
        "num_expert_group": config.n_group,
        "topk_group": config.topk_group,
        "top_k": config.num_experts_per_tok,
        # The official code normalizes only where there is more than one weight.
        "renormalize": config.num_experts_per_tok > 1,
        "routed_scaling_factor": config.routed_scaling_factor,
    }


class BailingMoeV2Gate(GateLinear):
    """Router projection with fp32 logits, and the bias that only the choice of experts sees.

    The official code multiplies in fp32. A bf16 weight gives the same products (a product of two bf16 numbers is exact
    in fp32, where they are summed) at half the bytes, so a bf16 model keeps the gate in bf16 where there is a bf16
    product with fp32 result. Elsewhere, and for weights that bf16 cannot hold, the gate is fp32. The first weights
    decide: later, CUDA graphs hold on to the parameter as it is.

    Raises:
        CheckpointError: From the weight loader, if later weights need fp32 and the first did not.
    """

    weight: Any  # torch declares every attribute of a module as "Tensor | Module"
    expert_bias: torch.Tensor

    def __init__(self, config: BailingMoeV2Config, vllm_config: VllmConfig, prefix: str) -> None:
        model_dtype = torch.get_default_dtype()
        try_bf16 = (
            model_dtype == torch.bfloat16
            and not keeps_fp32_router(vllm_config)
            and (
                current_platform.is_cuda_alike() or multiplies_gate(vllm_config, config.num_experts, config.hidden_size)
            )
        )
        super().__init__(
            config.hidden_size,
            config.num_experts,
            out_dtype=torch.float32,
            params_dtype=model_dtype if try_bf16 else torch.float32,
            prefix=prefix,
        )
        # This path takes any number of tokens; without it GateLinear would round the logits to bf16.
        if try_bf16 and not current_platform.is_cpu() and not self.allow_cublas_router_gemm:
            self._keep_fp32()
        # Dummy weights are never loaded, and the model runs before real ones replace them.
        self._is_settled = vllm_config.load_config.load_format == "dummy"
        self.weight.weight_loader = self._load_weight
        # A buffer, as in the official code: vLLM keeps those over a deep sleep, and trainers may send parameters alone.
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Logits [T, E] fp32 of hidden states [T, H], in the form of a vLLM linear layer."""
        if not current_platform.is_cpu():
            return super().forward(x)
        # GateLinear casts to its weight's dtype, which is not that of the logits; where vLLM has packed the weight, it
        # may be an empty one in bf16.
        return super(GateLinear, self).forward(x.float())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Called by vLLM's AutoWeightsLoader, which by itself loads parameters alone; returns the names."""
        loaded = set()
        for name, tensor in weights:
            own = getattr(self, name)
            getattr(own, "weight_loader", default_weight_loader)(own, tensor)
            loaded.add(name)
        return loaded

    def _keep_fp32(self) -> None:
        self.weight.data = self.weight.data.float()
        # vLLM remembers the parameter as it was built, for updates of the running model to begin with.
        remembered = get_layerwise_info(self).restore_metadata[0].get("weight")
        if remembered is not None:
            remembered.data = remembered.data.float()
        # GateLinear decides by its first dtype which kernels it may take, and has some warmed up. One that is built in
        # fp32 decides as it is right now.
        with torch.device("meta"):
            same = GateLinear(
                self.input_size,
                self.output_size,
                out_dtype=torch.float32,
                params_dtype=torch.float32,
                prefix=self.prefix,
            )
        vars(self).update({name: value for name, value in vars(same).items() if name.startswith("allow_")})

    def _load_weight(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if param.dtype == torch.bfloat16 and not torch.equal(loaded_weight.bfloat16().float(), loaded_weight.float()):
            if self._is_settled:
                raise CheckpointError(
                    "the new router weights need fp32, and the running model keeps them in bf16, as the first ones "
                    f"allowed; start it with --additional-config '{{\"{FP32_ROUTER}\": true}}'"
                )
            logger.info_once("The router weights of this checkpoint need fp32 and are kept so.")
            self._keep_fp32()
        param.data.copy_(loaded_weight)
        self._is_settled = True
