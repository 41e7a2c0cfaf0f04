"""What is tuned, and the configurations of vLLM's fused-experts kernel that are worth timing.

Dimension letters: M tokens, E routed experts of one rank, N their width on it, K hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from vllm_bailing.config import BailingMoeV2Config

TileConfig = dict[str, int]  # what vLLM calls the configuration of the kernel, keys as in `FIELDS`
FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
# vLLM takes the entry whose M is nearest, so a short ladder would be wrong between its rungs.
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
DTYPES = ("bf16", "fp8")
BLOCK = 128  # side of a block of fp8 weights that shares a scale


@dataclass(frozen=True)
class Experts:
    """The routed experts of one rank, as far as their speed depends on it.

    Attributes:
        num_experts: E, on this rank.
        intermediate_size: N, on this rank.
        dtype: "bf16", or "fp8" with a scale for each block of 128 x 128 weights.
        ep_size: Ranks that have E experts each, of which a token picks `top_k` in all.
    """

    num_experts: int
    intermediate_size: int
    hidden_size: int
    top_k: int
    n_group: int
    topk_group: int
    dtype: str
    ep_size: int = 1

    @property
    def global_num_experts(self) -> int:
        """Those of all ranks."""
        return self.num_experts * self.ep_size

    @property
    def block_shape(self) -> list[int] | None:
        return [BLOCK, BLOCK] if self.dtype == "fp8" else None

    @property
    def table_dtype(self) -> str | None:
        """Spelling of the file name. Source: vLLM, `fused_moe.config._get_config_dtype_str`."""
        return "fp8_w8a8" if self.dtype == "fp8" else None

    @property
    def element_bytes(self) -> int:
        return 1 if self.dtype == "fp8" else 2

    @property
    def w1_shape(self) -> tuple[int, int, int]:
        """Gate and up projections: [E, 2 N, K]."""
        return self.num_experts, 2 * self.intermediate_size, self.hidden_size

    @property
    def w2_shape(self) -> tuple[int, int, int]:
        """Down projections: [E, K, N]."""
        return self.num_experts, self.hidden_size, self.intermediate_size

    @property
    def weight_bytes(self) -> int:
        return 3 * self.num_experts * self.intermediate_size * self.hidden_size * self.element_bytes


def experts_of(
    config: BailingMoeV2Config, tp_size: int, dtype: str | None = None, expert_parallel: bool = False
) -> Experts:
    """The experts that one of `tp_size` ranks has: a part of each, or whole ones by expert parallelism.

    Args:
        dtype: One of `DTYPES`; what the checkpoint is stored in if left out.
    Raises:
        ValueError: If they cannot be divided so, or there are no tables for this dtype.
    """
    dtype = dtype or _stored_dtype(config)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} has no tables of vLLM's Triton experts; use one of {', '.join(DTYPES)}")
    divided, ep_size = ("num_experts", tp_size) if expert_parallel else ("moe_intermediate_size", 1)
    if tp_size < 1 or getattr(config, divided) % tp_size:
        raise ValueError(
            f"--tensor-parallel-size {tp_size} must divide {divided}={getattr(config, divided)}; choose another"
        )
    width = config.moe_intermediate_size * ep_size // tp_size
    for name, size in (
        ("moe_intermediate_size / tensor-parallel size", width),
        ("hidden_size", config.hidden_size),
    ):
        if dtype == "fp8" and size % BLOCK:
            raise ValueError(
                f"{name} = {size} is not a multiple of {BLOCK}, the blocks of fp8 weights, and vLLM's releases differ "
                "in the blocks that they make of it; choose another --tensor-parallel-size"
            )
    return Experts(
        config.num_experts // ep_size,
        width,
        config.hidden_size,
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        dtype,
        ep_size,
    )


def _stored_dtype(config: BailingMoeV2Config) -> str:
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return "bf16"
    groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    blocks = [quantization.get("weight_block_size"), *(weights.get("block_structure") for weights in groups)]
    if [BLOCK, BLOCK] in blocks:
        return "fp8"
    raise ValueError(
        f"the checkpoint's weights are quantized by {quantization.get('quant_method')!r} and not in blocks of "
        f"{BLOCK} x {BLOCK}, for which alone this makes tables of quantized experts; name another by --dtype "
        f"{' or '.join(DTYPES)}"
    )


def shared_memory_bytes(experts: Experts, config: TileConfig) -> int:
    """Shared memory of a block of threads: tiles of both operands for each stage, or the tile of the result.

    Within 3 % of what Triton 3.6 reports for this kernel on Hopper, or above it.
    """
    block_m, block_n, block_k = (config[field] for field in FIELDS[:3])
    # Products of 64 rows and more read their operands from there, smaller ones from registers, one stage later. With
    # fp8 vLLM swaps the operands of small tiles, which makes them large ones.
    is_read_there = block_m >= 64 or experts.block_shape is not None
    stages = config["num_stages"] if is_read_there else config["num_stages"] - 1
    return max((block_m + block_n) * block_k * experts.element_bytes * stages, block_m * block_n * 2)


def candidates(experts: Experts, tokens: int, shared_memory: int) -> list[TileConfig]:
    """Configurations worth timing for M tokens on a GPU whose blocks have `shared_memory` bytes.

    Tiles are at most four times as high as an expert's mean share of the tokens, since the rest would be padding, and
    no less than a quarter, since weights would be read again for each. Threads hold 8 to 128 numbers of the result:
    with more they run out of registers, with fewer most of them wait.
    """
    share = tokens * experts.top_k / experts.global_num_experts
    heights = [size for size in (16, 32, 64, 128) if size == 16 or size <= 4 * share]
    heights = [size for size in heights if 4 * size >= share] or heights[-1:]
    widths = [size for size in (32, 64, 128, 256) if size <= max(32, 2 * experts.intermediate_size)]
    depths = [size for size in (64, 128, 256) if size <= max(64, experts.intermediate_size)]
    if experts.block_shape:  # a step along K has one scale
        depths = [size for size in depths if BLOCK % size == 0]
    groups = (1, 16) if share >= 1 else (1,)  # with less than a tile per expert there is nothing to group
    stages = (2, 3, 4, 5) if share < 16 else (2, 3, 4)  # with many tokens products hide the loads
    configs = []
    for values in product(heights, widths, depths, groups, (4, 8), stages):
        config = dict(zip(FIELDS, values, strict=True))
        numbers = values[0] * values[1] / (32 * config["num_warps"])
        is_narrow = values[0] >= 64 and values[1] < 64
        # The smallest tiles give four warps less to do than that, and still are the best for few tokens.
        fits = numbers <= 128 and (numbers >= 8 or config["num_warps"] == 4)
        if fits and not is_narrow and shared_memory_bytes(experts, config) <= shared_memory:
            configs.append(config)
    return configs


def tile_key(config: TileConfig) -> tuple[int, ...]:
    """The values of `config` in the order of `FIELDS`: what tells it from others, for keys and JSON."""
    return tuple(config[field] for field in FIELDS)
