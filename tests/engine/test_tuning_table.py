"""The tuner's files as vLLM reads them."""

from __future__ import annotations

import pytest

from tests.support.engine import run
from tests.support.tuning import DEFAULT, NAMES
from vllm_bailing.plugin import patches
from vllm_bailing.tuning import table
from vllm_bailing.tuning.search import Row
from vllm_bailing.tuning.space import LADDER, candidates


def rows_of(experts, limit=227 * 1024):
    """One row for each M, every other one kept, all entries different where they can be."""
    rows = []
    for index, tokens in enumerate(LADDER):
        best = candidates(experts, tokens, limit)[index]
        rows.append(Row(tokens, DEFAULT, best, 1.0, 0.5 + index / 100, 1.5, index % 2 == 0, 40, 2))
    return rows


def _read_back(experts, folder, device):
    import os

    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = folder
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs, try_get_optimal_moe_config

    block_n, block_k = experts.block_shape or (0, 0)
    with patches.pretend_device(device):
        loaded = get_moe_configs(experts.num_experts, experts.intermediate_size, experts.table_dtype, block_n, block_k)
        taken = {
            tokens: try_get_optimal_moe_config(
                experts.w1_shape,
                experts.w2_shape,
                experts.top_k,
                experts.table_dtype,
                tokens,
                block_shape=experts.block_shape,
            )
            for tokens in (3000, 100000, *LADDER)
        }
    return loaded, taken


def _all_read_back(folder):
    return [_read_back(experts, folder, device) for experts, device, _ in NAMES]


@pytest.fixture(scope="module")
def read_back(tmp_path_factory):
    """For each table, by its name: what vLLM loads and takes."""
    folder = tmp_path_factory.mktemp("tables")
    for experts, _, name in NAMES:
        table.write_table(folder / name, table.table(rows_of(experts), "3.6.0"), {})
    return dict(zip([name for *_, name in NAMES], run(_all_read_back, str(folder)), strict=True))


@pytest.mark.parametrize(("experts", "device", "name"), NAMES)
def test_vllm_reads_the_same_integers_back(experts, device, name, read_back):
    rows = rows_of(experts)
    loaded, taken = read_back[name]
    assert loaded == {row.tokens: row.config for row in rows}
    assert taken == loaded | {3000: loaded[3072], 100000: loaded[4096]}
