"""The router: in fp32 whatever the model computes in."""

import importlib.util
import tempfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import PROMPT, make_checkpoint
from tests.support.engine import ask, make_llm, run


def _watch_router(model, dtype):
    """What the first MoE layer's gate and router saw and gave."""
    llm = make_llm(model, dtype=dtype)
    seen = {}

    def watch(module):
        mlp = module.model.layers[1].mlp
        mlp.gate.register_forward_hook(lambda gate, inputs, output: seen.update(hidden=inputs[0], logits=output[0]))
        select = mlp.experts.router.select_experts

        def select_experts(*args, **kwargs):
            seen["weights"], seen["ids"] = result = select(*args, **kwargs)
            return result

        mlp.experts.router.select_experts = select_experts

    def watch_older_vllm():
        """There the kernel for CPUs chooses the experts itself, layer after layer."""
        kernel = importlib.import_module("vllm.model_executor.layers.fused_moe.cpu_fused_moe")
        select = kernel.select_experts

        def select_experts(*args, **kwargs):
            weights, ids = select(*args, **kwargs)
            seen.setdefault("weights", weights), seen.setdefault("ids", ids)
            return weights, ids

        kernel.select_experts = select_experts

    if importlib.util.find_spec("vllm.model_executor.layers.fused_moe.cpu_fused_moe"):
        watch_older_vllm()
    llm.apply_model(watch)
    ask(llm, [PROMPT], max_tokens=1, logprobs=False)
    return {name: tensor.clone() for name, tensor in seen.items()}


def _with_routers_that_need_fp32(model):
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensors[name] = tensor.float() * 1.001
            assert not torch.equal(tensors[name], tensors[name].bfloat16().float())
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("dtype", "fits"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_routing_stays_in_fp32_whatever_the_model_computes_in(dtype, fits, tmp_path):
    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    model = make_checkpoint(tmp_path)
    if not fits:
        _with_routers_that_need_fp32(model)
    seen = run(_watch_router, model, dtype)
    plain = BailingMoeV2ForCausalLM.from_pretrained(model, dtype=torch.float32).model.layers[1].mlp.gate
    assert seen["hidden"].dtype == getattr(torch, dtype)
    assert seen["logits"].dtype == torch.float32
    exact = seen["hidden"].double() @ plain.weight.double().T
    # bf16 logits would be off by 2^-9 of their size, up to 1e-2 here.
    assert (seen["logits"] - exact).abs().max() < 1e-5
    ids, weights, _ = plain(seen["hidden"].float())
    order, plain_order = seen["ids"].long().sort(-1), ids.sort(-1)
    assert torch.equal(order.values, plain_order.values)
    torch.testing.assert_close(
        seen["weights"].gather(1, order.indices), weights.gather(1, plain_order.indices), atol=1e-5, rtol=0
    )


def _gate_as_on_a_gpu(model, updates, reloads=False, **options):
    """What a gate of a bf16 model holds after each of `updates`, on a machine with vLLM's bf16 product.

    The product itself needs that machine; which weights the gate keeps does not. With `reloads` all but the first
    update go through vLLM's layerwise reload.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import reload

    import vllm_bailing.router as ours

    class GpuPlatform:
        is_cpu, is_cuda_alike = staticmethod(lambda: False), staticmethod(lambda: True)

    build = ours.GateLinear.__init__

    def build_with_product(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.allow_cublas_router_gemm = self.weight.dtype == torch.bfloat16

    ours.current_platform, ours.GateLinear.__init__ = GpuPlatform, build_with_product
    arguments = EngineArgs(str(model), dtype="bfloat16", skip_tokenizer_init=True, **options)
    vllm_config = arguments.create_engine_config()
    seen = []
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        gate = ours.BailingMoeV2Gate(vllm_config.model_config.hf_config, vllm_config, "model.layers.1.mlp.gate")
        gate.quant_method.process_weights_after_loading = lambda layer: None  # as on a GPU
        reload.record_metadata_for_reloading(gate)  # vLLM does it before weights come
        for update in updates:
            is_reload = reloads and bool(seen)
            if is_reload:
                reload.initialize_layerwise_reload(gate)
            try:
                gate.weight.weight_loader(gate.weight, update)
                error = ""
            except RuntimeError as refusal:
                error = str(refusal)
            if is_reload:
                reload.finalize_layerwise_reload(gate, vllm_config.model_config)
            seen.append((gate.weight.data.clone(), gate.allow_cublas_router_gemm, error))
    return seen


def test_a_router_that_bf16_cannot_hold_is_kept_in_fp32(tmp_path):
    model = make_checkpoint(tmp_path)
    torch.manual_seed(0)
    needs_fp32 = torch.randn(16, 64)
    exact = needs_fp32.bfloat16()
    (first, in_bf16, _), (kept, _, error) = run(_gate_as_on_a_gpu, model, [exact, needs_fp32])
    assert first.dtype == torch.bfloat16 and torch.equal(first, exact) and in_bf16
    assert torch.equal(kept, exact) and "bailing_fp32_router" in error
    ((weight, in_bf16, _), (later, _, error)) = run(_gate_as_on_a_gpu, model, [needs_fp32, exact])
    assert torch.equal(weight, needs_fp32) and not in_bf16
    assert torch.equal(later, exact.float()) and not error
    additional = {"additional_config": {"bailing_fp32_router": True}}
    ((weight, in_bf16, _), (later, _, error)) = run(_gate_as_on_a_gpu, model, [exact, needs_fp32], **additional)
    assert torch.equal(weight, exact.float()) and not in_bf16
    assert torch.equal(later, needs_fp32) and not error
    ((_, _, error),) = run(_gate_as_on_a_gpu, model, [needs_fp32], load_format="dummy")
    assert "bailing_fp32_router" in error


def test_a_router_in_fp32_is_reloaded_as_it_is(tmp_path):
    model = make_checkpoint(tmp_path)
    torch.manual_seed(0)
    needs_fp32, other = torch.randn(16, 64), torch.randn(16, 64)
    exact = needs_fp32.bfloat16()
    updates = [needs_fp32, needs_fp32, other, exact]
    for (weight, _, error), update in zip(run(_gate_as_on_a_gpu, model, updates, True), updates, strict=True):
        assert not error and weight.dtype == torch.float32 and torch.equal(weight, update.float())
    (_, _, _), (kept, _, error), (later, _, _) = run(_gate_as_on_a_gpu, model, [exact, other, exact], True)
    assert "bailing_fp32_router" in error
    assert torch.equal(kept, exact) and torch.equal(later, exact)
