"""The memory that a plan counts, against recorded calculations and files."""

from __future__ import annotations

import pytest
from serve_configs import zoo_config

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.planning import GB, MIDDLE, MTP, plan
from tests.support.quantized import quantize
from vllm_bailing.config import read_config

# Calculated apart from this package, with every weight divided by all GPUs: checkpoint, dtype, GPUs; then GB of weights
# per GPU, tokens of KV cache, verdict for four requests of 32768 tokens. An MTP layer drafts.
FIT = [
    ("Ling-flash-2.0", None, 4, "H100", 53.1, 1.14e6, "fits"),
    ("Ling-flash-2.0", None, 4, "H20", 53.1, 2.07e6, "fits"),
    ("Ling-flash-2.0", None, 2, "H200", 106.2, 0.77e6, "fits"),
    ("Ling-flash-2.0", None, 2, "H20-3e", 106.2, 0.77e6, "fits"),
    ("Ling-flash-2.0", None, 2, "H100", 106.2, 0, "no"),
    ("Ling-flash-2.0", None, 2, "H20", 106.2, 0, "no"),
    ("Ling-flash-2.0", "fp8", 1, "H200", 107.5, 0.37e6, "fits"),
    ("Ling-flash-2.0", "fp8", 2, "H100", 53.8, 0.55e6, "fits"),
    ("Ling-flash-2.0", "fp8", 2, "H20", 53.8, 1.01e6, "fits"),
    ("Ling-flash-2.0", "int4", 1, "H100", 58.8, 0.20e6, "fits"),
    ("Ling-flash-2.0", "int4", 1, "H20", 58.8, 0.43e6, "fits"),
    ("Ling-mini-2.0", None, 1, "H100", 34.2, 0.91e6, "fits"),
    ("Ling-1T-FP8", None, 8, "H200", 127, 0.09e6, "tight"),
    ("Ling-1T-FP8", None, 8, "B200", 127, 1.0e6, "fits"),
    ("Ling-1T", None, 16, "H200", 126.6, 0.10e6, "tight"),
]


def replicated_bytes(config, tp):
    """What the recorded calculation divides by `tp` although every rank has it whole: routers, `eh_proj`; in bf16."""
    routers = (len(config.moe_layer_ids) + 1) * config.num_experts * config.hidden_size
    return (routers + 2 * config.hidden_size**2) * 2 * (1 - 1 / tp)


@pytest.mark.parametrize(("name", "dtype", "gpus", "gpu", "weights_gb", "kv_tokens", "verdict"), FIT)
def test_recorded_fit(name, dtype, gpus, gpu, weights_gb, kv_tokens, verdict):
    config = zoo_config(name, **MTP)
    found = plan(config, gpu, gpus, 32768, 4, dtype=dtype, draft_tokens=1, tp=gpus)
    assert found.weights.total / GB == pytest.approx(weights_gb, rel=0.02)
    assert found.verdict == verdict
    if kv_tokens:
        # Where the room is what two large numbers leave, the part that is whole on every rank shows.
        extra = replicated_bytes(config, gpus) / found.kv_bytes_per_token
        assert found.kv_tokens + extra == pytest.approx(kv_tokens, rel=0.1)


@pytest.mark.parametrize(("kv_dtype", "element"), [("auto", 2), ("fp8", 1)])
@pytest.mark.parametrize(("draft_tokens", "drafts"), [(0, 0), (1, 1), (3, 1)])
def test_a_tokens_cache_is_a_key_and_a_value_of_every_layer_and_of_the_drafts(draft_tokens, drafts, kv_dtype, element):
    """By definition; the recorded numbers above are rounded, and a draft's layer is one of thirty."""
    config = zoo_config("Ling-flash-2.0", **MTP)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (32, 4, 128)
    options = {"kv_dtype": kv_dtype, "draft_tokens": draft_tokens}
    for tp, heads in ((1, 4), (4, 1), (8, 1)):
        found = plan(config, "B200", tp, 4096, 1, tp=tp, **options)
        assert found.kv_bytes_per_token == (32 + drafts) * 2 * heads * 128 * element
    # The draft is the last stage's.
    found = plan(config, "B200", 2, 4096, 1, pp=2, **options)
    sizes = [layers * 2 * 4 * 128 * element for layers in (found.layer_partition[0], found.layer_partition[1] + drafts)]
    assert found.kv_bytes_per_token in sizes
    if draft_tokens:
        assert found.kv_bytes_per_token == sizes[1]  # with the head and the draft, it has the least room


@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_quantised_weights_are_what_the_files_hold(scheme, tmp_path):
    model = make_checkpoint(
        tmp_path, **{**MIDDLE, "vocab_size": 1024, "moe_intermediate_size": 160}
    )  # half-empty blocks
    quantize(model, scheme)
    config = read_config(model)
    # Some scales are stored in a smaller dtype than they are used in.
    stored = sum(
        tensor.numel() * 4 if "scale" in name else tensor.nbytes for name, tensor in read_tensors(model).items()
    )
    found = plan(config, "H100", 1, 64, 1, draft_tokens=1)
    assert found.dtype == {"fp8": "fp8", "w8a8": "int8"}[scheme]
    assert found.weights.total == stored
