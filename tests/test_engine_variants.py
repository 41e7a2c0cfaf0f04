"""Configurations without recorded vectors, through the engine, against the plain PyTorch reference in fp32."""

import importlib.util
import json
import tempfile

import pytest
import torch
from checkpoints import PROMPT, make_checkpoint, no_expert, plain_answer, quantize, read_tensors, write_tensors
from engine import TWO_RANKS, TWO_SPAWNED_RANKS, ask, generate, make_llm, run
from test_engine_reference import TOLERANCE

VARIANTS = {
    "one_expert_per_token": {"num_experts_per_tok": 1},
    "no_groups": {"n_group": None, "topk_group": None},
    "no_shared_expert": {"num_shared_experts": 0},
    "three_shared_experts": {"num_shared_experts": 3},
    "wider_shared_expert": {"moe_shared_expert_intermediate_size": 64},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "only_dense_layers": {"first_k_dense_replace": 3},
    "no_expert_bias": {"moe_router_enable_expert_bias": False},
    "scaling_factor_1": {"routed_scaling_factor": 1.0},
    "one_key_value_head_per_head": {"num_key_value_heads": 4},
    "rotary_dim_only": {"partial_rotary_factor": None, "rotary_dim": 8},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn_with_all_keys": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 1.3,
        },
        "max_position_embeddings": 64,
    },
    "theta_10000": {"rope_theta": 10000},
    "only_qkv_bias": {"use_qkv_bias": True},
    "only_dense_bias": {"use_bias": True},
    "norm_head": {"norm_head": True},
    "two_mtp_layers": {"num_nextn_predict_layers": 2},
}


@pytest.mark.engine
@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_computes_what_the_plain_reference_computes(variant, tmp_path):
    model = make_checkpoint(tmp_path, **VARIANTS[variant])
    wanted, wanted_ids = plain_answer(model, PROMPT)
    ((logprobs, token_ids),) = run(generate, model, [PROMPT])
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


@pytest.mark.engine
@pytest.mark.parametrize("shards", [1, 5])
def test_one_key_value_head_is_copied_to_both_ranks(shards, tmp_path):
    model = make_checkpoint(tmp_path, shards=shards, num_key_value_heads=1, num_shared_experts=2, use_qkv_bias=True)
    wanted, wanted_ids = plain_answer(model, PROMPT)
    ((logprobs, token_ids),) = run(generate, model, [PROMPT], env=TWO_RANKS, tensor_parallel_size=2)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


@pytest.mark.engine
def test_pipeline_stages_compute_the_same(tmp_path):
    model = make_checkpoint(tmp_path, tie_word_embeddings=True)
    wanted, wanted_ids = plain_answer(model, PROMPT)
    # vLLM's CPU worker prepares the tensors between stages only while it warms up a really compiled model.
    env = {**TWO_SPAWNED_RANKS, "VLLM_CPU_CI_ENV": "0"}
    ((logprobs, token_ids),) = run(generate, model, [PROMPT], env=env, enforce_eager=False, pipeline_parallel_size=2)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


def _before_and_after_reload(model):
    llm = make_llm(model)
    before = ask(llm, [PROMPT])
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return before[0], ask(llm, [PROMPT])[0]


@pytest.mark.engine
def test_reloading_leaves_the_same_model(tmp_path):
    before, after = run(_before_and_after_reload, make_checkpoint(tmp_path))
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def _other_weights(model, other):
    llm = make_llm(model)
    ask(llm, [PROMPT])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    llm.reset_prefix_cache()
    return ask(llm, [PROMPT])[0]


@pytest.mark.engine
def test_reloading_other_weights_serves_those(tmp_path):
    model, other = make_checkpoint(tmp_path / "first"), make_checkpoint(tmp_path / "second", seed=1)
    wanted, wanted_ids = plain_answer(other, PROMPT)
    logprobs, token_ids = run(_other_weights, model, other)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


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


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_routing_stays_in_fp32_whatever_the_model_computes_in(dtype, tmp_path):
    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    model = make_checkpoint(tmp_path)
    seen = run(_watch_router, model, dtype, env={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})
    plain = BailingMoeV2ForCausalLM.from_pretrained(model, dtype=torch.float32).model.layers[1].mlp.gate
    assert seen["hidden"].dtype == getattr(torch, dtype)
    assert seen["logits"].dtype == torch.float32
    exact = seen["hidden"].double() @ plain.weight.double().T
    # bf16 logits would be off by 2^-9 of their size, up to 1e-2 here.
    assert (seen["logits"] - exact).abs().max() < 1e-5
    ids, weights = plain(seen["hidden"].float())
    order, plain_order = seen["ids"].long().sort(-1), ids.sort(-1)
    assert torch.equal(order.values, plain_order.values)
    torch.testing.assert_close(
        seen["weights"].gather(1, order.indices), weights.gather(1, plain_order.indices), atol=1e-5, rtol=0
    )


def _gate_as_on_a_gpu(model, updates, **options):
    """What a gate of a bf16 model holds after each of `updates`, on a machine with vLLM's bf16 product.

    The product itself needs that machine; which weights the gate keeps does not.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    import vllm_bailing.model as ours

    class GpuPlatform:
        is_cuda_alike = staticmethod(lambda: True)

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
        for update in updates:
            try:
                gate.weight.weight_loader(gate.weight, update)
                error = ""
            except RuntimeError as refusal:
                error = str(refusal)
            seen.append((gate.weight.data.clone(), gate.allow_cublas_router_gemm, error))
    return seen


@pytest.mark.engine
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


def _cache_scales(model):
    found = []

    def look(module):
        for layer in module.model.layers:
            found.append((layer.attention.attn._k_scale_float, layer.attention.attn._v_scale_float))

    llm = make_llm(model, kv_cache_dtype="fp8")
    llm.apply_model(look)
    ask(llm, [PROMPT], max_tokens=2, logprobs=False)
    return found


@pytest.mark.engine
def test_scales_of_the_kv_cache_reach_every_attention_layer(tmp_path):
    model = make_checkpoint(tmp_path)
    quantize(model, "w8a8", no_expert)
    tensors = read_tensors(model)
    for layer in range(3):
        prefix = f"model.layers.{layer}.attention"
        tensors[f"{prefix}.k_scale"], tensors[f"{prefix}.v_scale"] = torch.tensor([[0.5 + layer], [0.25 + layer]])
    write_tensors(model, tensors)
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (model / "config.json").write_text(json.dumps(config))
    scales = run(_cache_scales, model, env={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})
    assert scales == [(0.5 + layer, 0.25 + layer) for layer in range(3)]


def _parameter_names(model):
    names = []
    make_llm(model).apply_model(lambda module: names.extend(name for name, _ in module.named_parameters()))
    return names


@pytest.mark.engine
def test_mtp_layers_take_no_memory_without_speculation(tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    names = run(_parameter_names, model, env={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})
    assert any(name.startswith("model.layers.2.") for name in names)
    assert not any(name.startswith("model.layers.3.") for name in names)


def _hooks_for_later_features(model):
    llm = make_llm(model)
    found = {}

    def look(module):
        from vllm.model_executor.models.interfaces import is_mixture_of_experts, supports_eagle3, supports_lora

        found.update(
            moe=is_mixture_of_experts(module),
            eagle3=supports_eagle3(module),
            lora=supports_lora(module),
            embedding=tuple(module.model.embed_tokens.weight.shape),
            moe_layers=len(module.moe_layers),
            experts=(module.num_logical_experts, module.num_physical_experts, module.num_expert_groups),
        )

    llm.apply_model(look)
    return found


@pytest.mark.engine
def test_speculation_and_load_balancing_find_their_hooks(tmp_path):
    found = run(_hooks_for_later_features, make_checkpoint(tmp_path), env={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})
    assert found == {
        "moe": True,
        "eagle3": True,
        "lora": True,
        "embedding": (256, 64),
        "moe_layers": 2,
        "experts": (16, 16, 4),
    }
