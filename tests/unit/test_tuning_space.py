"""What is tuned, and the candidates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_configs import zoo_config

from tests.support.tuning import MINI, config
from vllm_bailing.tuning import space
from vllm_bailing.tuning.space import FIELDS, LADDER, Experts, candidates

# ---- what is tuned -------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_one_rank():
    experts = space.experts_of(zoo_config("Ling-flash-2.0"), 4)
    assert experts == Experts(256, 256, 4096, 8, 8, 4, "bf16")
    assert (experts.w1_shape, experts.w2_shape) == ((256, 512, 4096), (256, 4096, 256))
    assert experts.weight_bytes == 256 * 3 * 256 * 4096 * 2


def test_whole_experts_are_divided_by_expert_parallelism():
    experts = space.experts_of(zoo_config("Ling-flash-2.0"), 4, expert_parallel=True)
    assert experts == Experts(64, 1024, 4096, 8, 8, 4, "bf16", 4)
    assert (experts.w1_shape, experts.w2_shape) == ((64, 2048, 4096), (64, 4096, 1024))
    assert experts.global_num_experts == 256
    assert space.experts_of(zoo_config("Ling-mini-2.0"), 1, expert_parallel=True) == MINI
    # As many tokens for each expert as on one rank that has all of them.
    whole = space.experts_of(zoo_config("Ling-flash-2.0"), 1)
    assert candidates(experts, 512, 227 * 1024) == candidates(whole, 512, 227 * 1024)


@pytest.mark.parametrize(
    ("quantization", "wanted"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "block_structure": [128, 128]}}},
            },
            "fp8",
        ),
    ],
)
def test_the_checkpoints_own_dtype_is_taken(quantization, wanted):
    overrides = {"quantization_config": quantization} if quantization else {}
    assert space.experts_of(zoo_config("Ling-mini-2.0", **overrides), 1).dtype == wanted


@pytest.mark.parametrize(
    ("overrides", "tp", "dtype", "words"),
    [
        ({}, 3, None, "--tensor-parallel-size 3 must divide moe_intermediate_size=512"),
        ({}, 0, None, "--tensor-parallel-size 0 must divide"),
        ({}, 8, "fp8", "tensor-parallel size = 64 is not a multiple of 128"),
        ({}, 1, "int8", "--dtype int8 has no tables of vLLM's Triton experts; use one of bf16, fp8"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            1,
            None,
            "'gptq' and not in blocks of 128 x 128",
        ),
    ],
)
def test_what_has_no_table_is_refused_in_one_line(overrides, tp, dtype, words):
    with pytest.raises(ValueError) as error:
        space.experts_of(zoo_config("Ling-mini-2.0", **overrides), tp, dtype)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_experts_that_ranks_cannot_share_evenly_are_refused():
    with pytest.raises(ValueError, match=r"^--tensor-parallel-size 3 must divide num_experts=256; choose another$"):
        space.experts_of(zoo_config("Ling-mini-2.0"), 3, expert_parallel=True)


# ---- the search space ----------------------------------------------------------------------------------------------


@given(
    tokens=st.sampled_from(LADDER),
    experts=st.builds(
        Experts,
        st.sampled_from([8, 64, 256]),
        st.sampled_from([128, 256, 512, 1024, 2048]),
        st.sampled_from([2048, 4096, 8192]),
        st.sampled_from([1, 2, 8]),
        st.just(8),
        st.just(4),
        st.sampled_from(space.DTYPES),
    ),
    kib=st.sampled_from([64, 99, 163, 227]),
)
def test_candidates_keep_to_the_limits(tokens, experts, kib):
    found = candidates(experts, tokens, kib * 1024)
    keys = [tuple(one.values()) for one in found]
    assert found and len(set(keys)) == len(keys)
    for one in found:
        assert tuple(one) == FIELDS
        assert space.shared_memory_bytes(experts, one) <= kib * 1024
        assert all(value & (value - 1) == 0 for value in list(one.values())[:5]), "Triton takes powers of two"
        assert one["BLOCK_SIZE_M"] >= 16, "no matrix instruction takes fewer rows"
        assert one["BLOCK_SIZE_M"] * one["BLOCK_SIZE_N"] // (32 * one["num_warps"]) <= 128
        # A step along K that is longer than a block of weights would multiply with the scale of its first.
        assert experts.block_shape is None or experts.block_shape[1] % one["BLOCK_SIZE_K"] == 0


def test_shared_memory_is_what_triton_reports_for_sm_90():
    """Recorded from compiling vLLM 0.32's kernel by Triton 3.6, in bytes."""
    bf16, fp8 = MINI, Experts(256, 256, 4096, 8, 8, 4, "fp8")
    for experts, values, reported in (
        (bf16, (32, 64, 128, 1, 4, 4), 73728),
        (bf16, (64, 256, 128, 16, 8, 3), 245760),
        (bf16, (16, 64, 256, 1, 4, 3), 81920),
        (bf16, (64, 64, 256, 1, 4, 2), 131072),
        (fp8, (16, 128, 128, 1, 4, 4), 74240),
        (fp8, (128, 256, 128, 16, 8, 4), 197632),
        (fp8, (32, 64, 64, 16, 8, 4), 24576),
    ):
        assert space.shared_memory_bytes(experts, config(*values)) == pytest.approx(reported, rel=0.02)


def test_tiles_grow_with_the_tokens_of_an_expert():
    def heights(tokens: int) -> set[int]:
        return {one["BLOCK_SIZE_M"] for one in candidates(MINI, tokens, 227 * 1024)}

    assert heights(1) == {16}
    assert heights(4096) == {32, 64, 128}
