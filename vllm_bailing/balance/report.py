"""What `vllm-bailing balance` reports, and its plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_bailing.balance.simulate import Balance, tokens_of_step, waiting
from vllm_bailing.balance.trace import Trace
from vllm_bailing.bench.plots import figure_at

Report = dict[str, Any]


def balance_report(trace: Trace, balances: list[Balance], step_tokens: int) -> Report:
    """The report: what was recorded, `load` by layer, and `ranks` for every number of ranks."""
    load = trace.load()
    rows = []
    for layer, counts in zip(trace.layers, load, strict=True):
        even = counts.mean()
        rows.append(
            {
                "layer": layer,
                "busiest": int(counts.argmax()),
                "most": float(counts.max() / even),
                "least": float(counts.min() / even),
                "never": int((counts == 0).sum()),
                "picks": counts.tolist(),
            }
        )
    ranks = [
        {
            **asdict(one),
            "waiting": waiting(one.linear),
            "waiting_with_eplb": waiting(one.worth.imbalance),
        }
        for one in balances
    ]
    return {
        "model": trace.model,
        "requests": len(trace.lengths),
        "tokens": sum(trace.lengths),
        "experts": trace.experts,
        "experts_per_token": trace.shape["num_experts_per_tok"],
        "step_tokens": tokens_of_step(trace, step_tokens),
        "load": rows,
        "ranks": ranks,
    }


def plot_balance(report: Report, path: Path) -> None:
    """Load of every expert by layer, and imbalance by number of ranks.

    Args:
        report: Of `balance_report`.
    Raises:
        ImportError: Without matplotlib.
    """
    with figure_at(path, (10, 3.8), panels=2, gridspec_kw={"width_ratios": [1.4, 1]}) as (figure, (left, right)):
        from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

        rows = report["load"]
        # Sorted: which expert is busy means nothing, how uneven a layer is does.
        shares = [sorted(pick * report["experts"] / sum(row["picks"]) for pick in row["picks"]) for row in rows]
        for row, share in zip(rows, shares, strict=True):
            shade = 0.15 + 0.75 * (row["layer"] - rows[0]["layer"]) / max(1, rows[-1]["layer"] - rows[0]["layer"])
            label = f"layer {row['layer']}" if row in (rows[0], rows[-1]) else None
            left.step(range(1, len(share) + 1), share, where="mid", color=_shade(shade), linewidth=1, label=label)
        left.axhline(1, color="grey", linewidth=0.8)
        left.set(xlabel="experts of a layer, least picked first", ylabel="picks, times an even share", ylim=(0, None))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend()
        ranks = report["ranks"]
        sizes = [row["ep"] for row in ranks]
        for label, values, style in (
            ("in their order", [row["linear"] for row in ranks], "o-"),
            ("round robin", [row["round_robin"] for row in ranks], "s-"),
            ("EPLB, no copies", [row["eplb"][0]["imbalance"] for row in ranks], "^-"),
            ("EPLB, copies worth having", [row["worth"]["imbalance"] for row in ranks], "D-"),
            ("no preferences, by chance", [row["even"] for row in ranks], "k:"),
        ):
            right.plot(sizes, values, style, label=label, markersize=4)
        right.set_xscale("log", base=2)
        right.xaxis.set_major_locator(FixedLocator(sizes))
        right.xaxis.set_minor_locator(NullLocator())
        right.set_xticklabels(sizes)
        right.set(xlabel="expert-parallel ranks", ylabel="busiest rank, times an even share")
        right.legend(fontsize="small")
        for axis in (left, right):
            axis.grid(alpha=0.3)
        figure.suptitle(f"Experts of {report['model']}: {report['tokens']} tokens of {report['requests']} requests")
        figure.tight_layout()


def _shade(place: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](place)
