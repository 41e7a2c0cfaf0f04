"""What vLLM finds in the loaded model."""

import json

import torch

from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors, write_tensors
from tests.support.cpu import NEEDS_AVX512
from tests.support.engine import ask, loaded_rank, make_llm, run_in_turn, run_ranks
from tests.support.quantized import no_expert, quantize
from tests.support.versions import since


def _cache_scales(model):
    found = []

    def look(module):
        for layer in module.model.layers:
            found.append((layer.attention.attn._k_scale_float, layer.attention.attn._v_scale_float))

    llm = make_llm(model, kv_cache_dtype="fp8")
    llm.apply_model(look)
    ask(llm, [PROMPT], max_tokens=2, logprobs=False)
    return found


@NEEDS_AVX512
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
    scales = run_in_turn(_cache_scales, model)
    assert scales == [(0.5 + layer, 0.25 + layer) for layer in range(3)]


def _parameter_names(model):
    names = []
    make_llm(model).apply_model(lambda module: names.extend(name for name, _ in module.named_parameters()))
    return names


def test_mtp_layers_take_no_memory_without_speculation(tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    names = run_in_turn(_parameter_names, model)
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


def test_speculation_and_load_balancing_find_their_hooks(tmp_path):
    found = run_in_turn(_hooks_for_later_features, make_checkpoint(tmp_path))
    assert found == {
        "moe": True,
        "eagle3": True,
        "lora": True,
        "embedding": (256, 64),
        "moe_layers": 2,
        "experts": (16, 16, 4),
    }


def _logits_of_rank(rank, ranks, init, model, hidden):
    options = {"model": str(model), "tensor_parallel_size": ranks, "dtype": "float32"}
    module, _ = loaded_rank(rank, ranks, init, options)
    module.lm_head.quant_method.process_weights_after_loading(module.lm_head)
    return module.compute_logits_local(hidden), module.compute_logits(hidden)


@since("0.31", "logits of a rank's own rows")
@torch.inference_mode()
def test_logits_of_the_ranks_are_the_parts_of_all(tmp_path):
    """For --enable-batch-sharded-sampling, in which ranks exchange requests and not the vocabulary."""
    model = make_checkpoint(tmp_path / "model", vocab_size=250)  # vLLM pads it
    hidden = torch.randn(5, 64)
    ((whole, expected),) = run_ranks(_logits_of_rank, 1, tmp_path, model, hidden)
    found = run_ranks(_logits_of_rank, 2, tmp_path, model, hidden)
    parts = torch.cat([local for local, _ in found], dim=-1)
    assert parts.shape == whole.shape and parts.shape[-1] > 250
    torch.testing.assert_close(parts[:, :250], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], expected, atol=1e-5, rtol=1e-5)
