"""The memory that a plan counts, against recorded calculations and files."""

from __future__ import annotations

import itertools

import pytest
from serve_configs import zoo_config

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.planning import GB, MIDDLE, MTP, plan
from tests.support.quantized import quantize
from vllm_bailing.config import read_config
from vllm_bailing.planning.memory import (
    DTYPES,
    Layout,
    OtherMemory,
    Part,
    Stage,
    WeightBytes,
    stored_dtype,
)

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
def test_quantized_weights_are_what_the_files_hold(scheme, tmp_path):
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


# --- by hand ------------------------------------------------------------------------------------------------------

# Hidden size 512, 8 heads of 64 with 2 for keys and values, 2 dense layers of width 1024, 4 layers with 32 experts and
# a shared one of width 256, 1000 tokens, padded to 1024.
PLAIN = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2, "int8": 2, "int4": 2}
ROUTER = {"bf16": 2, "fp16": 4, "fp32": 4, "fp8": 2, "int8": 2, "int4": 2}


def matrices(dtype, *shapes, only_experts=True):
    """Bytes of linear layers with their scales; all sides are whole blocks of 128."""
    if dtype == "int4" and not only_experts:
        dtype = "bf16"
    per_weight = {"fp8": 1 + 4 / 128**2, "int4": 1 / 2 + 2 / 128}.get(dtype)
    if dtype == "int8":
        return sum(rows * columns + 4 * rows for rows, columns in shapes)
    return sum(rows * columns * (per_weight or PLAIN[dtype]) for rows, columns in shapes)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_by_hand(dtype, tp):
    plain, width, dense_width, kv_heads = PLAIN[dtype], 256 // tp, 1024 // tp, 2 // tp
    qkv, dense = ((8 // tp + 2 * kv_heads) * 64, 512), (512, 512 // tp)
    attention = matrices(dtype, qkv, dense, only_experts=False)
    mlp = matrices(dtype, (dense_width, 512), (dense_width, 512), (512, dense_width), only_experts=False)
    expert = matrices(dtype, (width, 512), (width, 512), (512, width))
    shared = matrices(dtype, (width, 512), (width, 512), (512, width), only_experts=False)
    router = 32 * 512 * ROUTER[dtype] + 32 * 4
    norms = (2 * 512 + 2 * 64) * plain
    vocabulary = 1024 // tp * 512 * plain
    moe = attention + 32 * expert + shared + router + norms
    draft = moe + 3 * 512 * plain + 512 * 1024 * plain
    layout = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), dtype, tp=tp, mtp_layers=1)
    assert layout.weights(Stage(0, 0, 6)) == WeightBytes(
        embedding=vocabulary,
        head=vocabulary,
        attention=6 * attention,
        dense_mlp=2 * mlp,
        routed_experts=4 * 32 * expert,
        shared_experts=4 * shared,
        router=4 * router,
        norms=6 * norms + 512 * plain,
        mtp=draft,
    )
    assert layout.weights(Stage(0, 0, 6)).total == (
        2 * vocabulary + 2 * (attention + mlp + norms) + 4 * moe + 512 * plain + draft
    )


@pytest.mark.parametrize(
    ("dtype", "gate", "down"),
    [
        ("fp8", 161 * 512 + 4 * (2 * 4), 512 * 161 + 4 * (4 * 2)),
        ("int4", 161 * 256 + 2 * 161 * 4, 512 * 81 + 2 * 512 * 2),
    ],
)
def test_half_empty_blocks_have_a_scale_as_well(dtype, gate, down):
    config = zoo_config("Ling-mini-2.0", **{**MIDDLE, "moe_intermediate_size": 161})
    assert Layout(config, dtype).weights(Stage(1, 5, 6)).routed_experts == 32 * (2 * gate + down)


def test_the_projection_of_an_mtp_layer_is_whole_and_plain():
    parts = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), "fp8", tp=2).layer_parts(6)
    assert parts["eh_proj"] == Part(512 * 1024 * 2, 512 * 1024)
    assert parts["norms"] == Part((5 * 512 + 2 * 64) * 2, 0)


def test_more_ranks_than_key_value_heads_keep_one_each():
    layout = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), "bf16", tp=8)
    assert layout.weights(Stage(0, 0, 1)).attention == 2 * ((1 + 2) * 64 * 512 + 512 * 64)
    assert layout.kv_bytes_per_layer == 2 * 64 * 2


def test_biases_stay_in_the_models_dtype():
    config = zoo_config("Ling-mini-2.0", **{**MIDDLE, "use_bias": True, "use_qkv_bias": True})
    for dtype in ("bf16", "int8"):
        stored = matrices(dtype, (12 * 64, 512), (512, 512)) + (12 * 64 + 512) * 2
        assert Layout(config, dtype).weights(Stage(0, 0, 1)).attention == stored
    # The bias of the output projection is added once, whole.
    halves = matrices("bf16", (6 * 64, 512), (512, 256)) + (6 * 64 + 512) * 2
    assert Layout(config, "bf16", tp=2).weights(Stage(0, 0, 1)).attention == halves


def test_every_stage_has_its_own_parts():
    config = zoo_config("Ling-mini-2.0", **MIDDLE)
    whole = Layout(config, "bf16", mtp_layers=1)
    first, middle, last = (Layout(config, "bf16", pp=3, mtp_layers=1).weights(stage) for stage in STAGES)
    vocabulary, norm = 1024 * 512 * 2, 512 * 2
    assert [part.embedding for part in (first, middle, last)] == [vocabulary, 0, 0]
    assert [part.head for part in (first, middle, last)] == [0, 0, vocabulary]
    # The draft's embedding is not on its stage, so it has a copy of it.
    assert [part.mtp for part in (first, middle, last)] == [0, 0, whole.weights(Stage(0, 0, 6)).mtp + vocabulary]
    assert Layout(config, "bf16", pp=3).weights(STAGES[2]).mtp == 0
    halves = Layout(config, "bf16", pp=2, mtp_layers=1).weights(Stage(1, 3, 6))
    assert halves.mtp == last.mtp
    (dense,) = {whole.weights(Stage(0, index, index + 1)).dense_mlp for index in (0, 1)}
    assert [part.dense_mlp for part in (first, middle, last)] == [dense, dense, 0]
    assert [part.routed_experts // (32 * 3 * 512 * 256 * 2) for part in (first, middle, last)] == [0, 2, 2]
    norms = (2 * 512 + 2 * 64) * 2
    assert [part.norms for part in (first, middle, last)] == [norms, 3 * norms, 2 * norms + norm]


STAGES = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), "bf16", pp=3).stages((1, 3, 2))


def test_stages_follow_each_other():
    assert STAGES == [(0, 0, 1), (1, 1, 4), (2, 4, 6)]


def test_a_tied_head_is_stored_once_unless_another_stage_has_it():
    config = zoo_config("Ling-mini-2.0", **{**MIDDLE, "tie_word_embeddings": True})
    alone = Layout(config, "bf16").weights(Stage(0, 0, 6))
    assert (alone.embedding, alone.head) == (0, 1024 * 512 * 2)
    first, last = (Layout(config, "bf16", pp=2).weights(stage) for stage in ((Stage(0, 0, 3)), Stage(1, 3, 6)))
    assert (first.embedding, first.head, last.embedding, last.head) == (1024 * 512 * 2, 0, 0, 1024 * 512 * 2)


@pytest.mark.parametrize("dense_layers", [0, 5, 6])
def test_all_layers_but_one_or_all_may_be_of_one_kind(dense_layers):
    config = zoo_config("Ling-mini-2.0", **{**MIDDLE, "first_k_dense_replace": dense_layers})
    weights = Layout(config, "bf16").weights(Stage(0, 0, 6))
    assert weights.dense_mlp == dense_layers * 3 * 512 * 1024 * 2
    assert weights.routed_experts == (6 - dense_layers) * 32 * 3 * 512 * 256 * 2


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "element"), [("bf16", "auto", 2), ("fp32", "auto", 4), ("fp32", "fp8", 1)]
)
def test_a_drafts_cache_is_on_the_last_stage(dtype, kv_dtype, element):
    config, layer = zoo_config("Ling-mini-2.0", **MIDDLE), 2 * 2 * 64 * element
    layout = Layout(config, dtype, kv_dtype, pp=3, mtp_layers=2)
    assert layout.kv_bytes_per_layer == layer
    assert [layout.kv_bytes_per_token(stage) for stage in STAGES] == [layer, 3 * layer, (2 + 2) * layer]


def test_the_tightest_stage_has_the_fewest_tokens():
    config = zoo_config("Ling-mini-2.0", **MIDDLE)
    layout = Layout(config, "bf16", pp=3)
    tokens = [(10**9 - layout.weights(stage).total) // layout.kv_bytes_per_token(stage) for stage in STAGES]
    assert layout.tightest((1, 3, 2), 10**9) == (min(tokens), STAGES[tokens.index(min(tokens))])
    assert layout.tightest((1, 3, 2), 0)[0] < 0


@pytest.mark.parametrize(("pp", "mtp_layers"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (6, 0)])
def test_balanced_stages_are_the_best_of_all(pp, mtp_layers):
    layout = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), "bf16", pp=pp, mtp_layers=mtp_layers)

    def fullest(partition):
        return max(layout.weights(stage).total for stage in layout.stages(partition))

    partitions = [sizes for sizes in itertools.product(range(1, 7), repeat=pp) if sum(sizes) == 6]
    assert layout.balanced_partition() in partitions
    assert fullest(layout.balanced_partition()) == min(map(fullest, partitions))


@pytest.mark.parametrize(("tp", "columns"), [(1, 512 + 512), (2, 512 + 512)])
def test_other_memory_by_hand(tp, columns):
    config = zoo_config("Ling-mini-2.0", **MIDDLE)
    expected = OtherMemory(100 * 8 * columns * 2, 100 * 512 * 16, 1024 * 1000 * 6, 3 * 2**29, 3 * 2**29)
    assert Layout(config, "bf16", tp=tp).other_memory(100) == expected
    wide = Layout(zoo_config("Ling-mini-2.0", **{**MIDDLE, "moe_intermediate_size": 2048}), "bf16", tp=tp)
    assert wide.other_memory(100).moe_workspace == 100 * 8 * (4096 // tp + 2048 // tp) * 2


@pytest.mark.parametrize(
    ("dtype", "plain"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "bf16"), (None, "bf16")]
)
def test_a_checkpoint_without_quantization_is_stored_as_vllm_computes(dtype, plain):
    assert stored_dtype(zoo_config("Ling-mini-2.0", torch_dtype=dtype)) == plain


@pytest.mark.parametrize(
    ("quantization", "fragment"),
    [
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors', None bits, int"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}}, "None bits, int"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "None bits, int"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["re:(", 3]}}},
            "pattern that is none",
        ),
        ({"quant_method": "awq", "bits": 3}, "'awq', 3 bits, int"),
        ({"quant_method": "mxfp4", "bits": 4}, "'mxfp4', None bits, int"),
    ],
)
def test_a_quantization_that_is_not_known_is_named(quantization, fragment):
    with pytest.raises(ValueError, match=fragment):
        stored_dtype(zoo_config("Ling-mini-2.0", quantization_config=quantization))
