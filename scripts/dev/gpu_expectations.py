"""What decoding on a GPU should look like by counting, and whether a measurement bears it out.

    python scripts/dev/gpu_expectations.py                         print the tables of docs/gpu-expectations.md
    python scripts/dev/gpu_expectations.py --write                 put them into the page
    python scripts/dev/gpu_expectations.py --check RESULT.json...  hold them against what `bench compare` measured

Counts come from scripts/gpu/rehearse.sh (tests/data/gpu_counts.json), bytes and bounds from `vllm_bailing.planning`.
Nothing here was measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from serve_configs import zoo_config
from tables import print_or_write, replaced

from vllm_bailing.bench.shapes import load_config
from vllm_bailing.bench.statistics import IN_TREE, PLUGIN
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.gpus import GPUS, Gpu, gpu_called
from vllm_bailing.planning.memory import Layout, Stage
from vllm_bailing.planning.roofline import bound, stage_step

ROOT = Path(__file__).resolve().parents[2]
COUNTS, PAGE = ROOT / "tests" / "data" / "gpu_counts.json", ROOT / "docs" / "gpu-expectations.md"
BEGIN, END = "<!-- expectations:begin -->", "<!-- expectations:end -->"
BATCHES = (1, 8, 64)
CONTEXT = 1152  # tokens before the one that is computed: in the middle of the answers of scripts/gpu/bench.sh
DEPLOYMENTS = {  # as in tests/cuda_build/test_counts.py: checkpoint, data type, tensor-parallel size
    "mini, TP 1": ("Ling-mini-2.0", "bf16", 1),
    "flash, TP 4": ("Ling-flash-2.0", "bf16", 4),
    "flash, fp8 blocks, TP 1": ("Ling-flash-2.0", "fp8", 1),
}
# Kernels that an operation launches, where that is not one. Source: vLLM 0.33.
LAUNCHES = {
    "vllm.moe_forward_shared": 0,  # counted inside
    "vllm.moe_forward": 0,
}


@dataclass(frozen=True)
class Expectation:
    """Of one deployment, class and batch.

    Attributes:
        layer_kernels, step_kernels: Of an MoE layer; of the decoder with embedding and last norm, without the head.
        layer_bytes, step_bytes: Weights and KV cache that one GPU reads; activations stay in its L2 cache.
        tokens_per_s: What reading them allows, all requests together.
    """

    layer_kernels: int
    step_kernels: int
    layer_bytes: float
    step_bytes: float
    tokens_per_s: float


def recorded_counts() -> dict[str, Any]:
    """The counts by release, GPU, deployment and class; empty before the first rehearsal recorded some."""
    return json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.is_file() else {}


def launches(calls: dict[str, int]) -> int:
    """Kernels that `calls`, numbers by operation, launch."""
    return sum(LAUNCHES.get(name, 1) * count for name, count in calls.items())


def expectation(counts: dict[str, Any], title: str, gpu: Gpu, batch: int) -> Expectation:
    """From the counts of one class, as tests/cuda_build/test_counts.py records them."""
    checkpoint, dtype, tp = DEPLOYMENTS[title]
    config = zoo_config(checkpoint)
    layout = Layout(config, dtype, tp=tp)
    layers, moe_layers = config.num_hidden_layers, len(config.moe_layer_ids)
    # The planner has routers in bf16, which is what ours are.
    router = config.num_experts * config.hidden_size * (2 if counts["router"] == "float32" else 0)
    up_to = [stage_step(layout, Stage(0, 0, end), CONTEXT, batch)[0] for end in (layers - 1, layers)]
    best = bound(layout, (layers,), gpu, CONTEXT, batch)
    assert best.limit == "bandwidth"
    step_bytes = up_to[1] + moe_layers * router
    layer = launches(counts["layer"]) + launches(counts["experts"][str(batch)])
    return Expectation(
        layer_kernels=layer,
        step_kernels=launches(counts["rest"]) + moe_layers * layer,
        layer_bytes=up_to[1] - up_to[0] + router,
        step_bytes=step_bytes,
        tokens_per_s=best.tokens_per_s * best.step_bytes / step_bytes,
    )


def gains(theirs: Expectation, ours: Expectation) -> tuple[float, float]:
    """Least and most that our class should be faster: as for bytes alone, and as for kernels alone."""
    low, high = sorted((theirs.step_bytes / ours.step_bytes, theirs.step_kernels / ours.step_kernels))
    return low, high


# ---- the page --------------------------------------------------------------------------------------------------------


def lines() -> list[str]:
    """A table for each release and GPU."""
    text: list[str] = []
    for version, by_gpu in reversed(recorded_counts().items()):
        for gpu, deployments in by_gpu.items():
            text += [
                "",
                f"vLLM {version}, {gpu}:",
                "",
                "| deployment | batch | kernels of an MoE layer | kernels of a step | MB of a layer | GB of a step "
                "| tokens/s at most | ours faster by |",
                f"|{'---|' * 8}",
            ]
            both = {title: arms for title, arms in deployments.items() if {IN_TREE, PLUGIN} <= set(arms)}
            for title, arms in both.items():
                text += [_row(title, batch, arms, GPUS[gpu]) for batch in BATCHES]
    return [*(text or ["", "Nothing was counted yet."]), ""]


def _row(title: str, batch: int, arms: dict[str, Any], gpu: Gpu) -> str:
    theirs, ours = (expectation(arms[arm], title, gpu, batch) for arm in (IN_TREE, PLUGIN))
    low, high = gains(theirs, ours)
    pairs = [
        (theirs.layer_kernels, ours.layer_kernels, "{}"),
        (theirs.step_kernels, ours.step_kernels, "{}"),
        (theirs.layer_bytes / 1e6, ours.layer_bytes / 1e6, "{:.1f}"),
        (theirs.step_bytes / 1e9, ours.step_bytes / 1e9, "{:.2f}"),
        (theirs.tokens_per_s, ours.tokens_per_s, "{:.0f}"),
    ]
    cells = [" / ".join(form.format(value) for value in (one, other)) for one, other, form in pairs]
    return f"| {title} | {batch} | {' | '.join(cells)} | {100 * (low - 1):.0f} to {100 * (high - 1):.0f} % |"


def with_tables(page: str) -> str:
    """`page` with the tables between its two marks replaced."""
    return replaced(page, BEGIN, END, lines())


# ---- measurements ----------------------------------------------------------------------------------------------------


def verdicts(report: dict[str, Any], recorded: dict[str, Any]) -> list[tuple[bool, str]]:
    """(whether it was met, what was expected and what came) of every expectation that `report` has a figure for.

    Args:
        report: Of `vllm-bailing bench compare`.
        recorded: The counts, by release, GPU and deployment.
    Raises:
        SystemExit: If nothing was expected of this GPU, release and deployment.
    """
    device, version = report["machine"]["device"], report["versions"]["vllm"].partition("+")[0]
    gpu, title = gpu_called(device), deployment(report)
    arms = recorded.get(version, {}).get(gpu.name if gpu else "", {}).get(title)
    if gpu is None or arms is None or {IN_TREE, PLUGIN} - set(arms):
        raise SystemExit(
            f"gpu_expectations: nothing is expected of {title or report['model']} on {device} with vLLM {version}; "
            f"rehearse it: scripts/gpu/rehearse.sh {version} {gpu.name if gpu else 'GPU'}"
        )
    found = []
    for arm in (IN_TREE, PLUGIN):
        for key, wanted in arms[arm]["runs"].items():
            came = report["arms"][arm][key]
            found.append((came == wanted, f"{arm}: {key} {wanted}; ran {came}"))
    by_figure = {(row["figure"], row["arm"]): row for row in report["rows"]}
    for batch in BATCHES:
        rows = [by_figure[key] for arm in (IN_TREE, PLUGIN) if (key := (f"decode {batch}", arm)) in by_figure]
        if len(rows) != 2:
            continue
        expected = [expectation(arms[arm], title, gpu, batch) for arm in (IN_TREE, PLUGIN)]
        for arm, row, one in zip((IN_TREE, PLUGIN), rows, expected, strict=True):
            speed, limit = row["median"], one.tokens_per_s
            found.append((speed <= limit, f"{arm}: decode {batch} at most {limit:.0f} tok/s; measured {speed:.0f}"))
        (low, high), (least, most), noise = gains(*expected), rows[1]["interval"], rows[1]["noise"]
        found.append(
            (
                least <= high * noise and most >= low / noise,
                f"{PLUGIN}: decode {batch} {low:.2f} to {high:.2f} times {IN_TREE}; measured {rows[1]['ratio']:.2f} "
                f"({least:.2f}-{most:.2f}, noise {100 * (noise - 1):.1f} %)",
            )
        )
    return found


def deployment(report: dict[str, Any]) -> str:
    """Which of DEPLOYMENTS was measured; empty if none was."""
    measured = BailingMoeV2Config.from_dict(report["config"]) if report["config"] else load_config(report["model"])
    dtype = {None: "bf16", "fp8": "fp8"}.get(report["arms"][PLUGIN]["quantization"])
    tp = report["engine"].get("tensor_parallel_size", 1)
    for title, (checkpoint, of_weights, ranks) in DEPLOYMENTS.items():
        config = zoo_config(checkpoint)
        sizes = [(one.num_hidden_layers, one.hidden_size) for one in (measured, config)]
        if (dtype, tp) == (of_weights, ranks) and sizes[0] == sizes[1]:
            return title
    return ""


def check(reports: list[Path]) -> bool:
    """Print the verdicts on each report; returns whether all expectations of all were met."""
    recorded, met_all = recorded_counts(), True
    for file in reports:
        print(file)
        for met, text in verdicts(json.loads(file.read_text(encoding="utf-8")), recorded):
            print(f"  {'met' if met else 'MISSED'}: {text}")
            met_all &= met
    return met_all


def main(
    reports: Annotated[list[Path] | None, typer.Argument(help="Results of `vllm-bailing bench compare`.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Replace the tables in docs/gpu-expectations.md.")] = False,
    check_results: Annotated[bool, typer.Option("--check", help="Hold the expectations against REPORTS.")] = False,
) -> None:
    """Print or write the tables, or check results against them."""
    if check_results:
        raise SystemExit(0 if check(reports or []) else 1)
    print_or_write(PAGE, BEGIN, END, lines(), write)


if __name__ == "__main__":
    typer.run(main)
