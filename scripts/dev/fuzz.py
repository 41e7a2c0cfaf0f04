"""Ten thousand damaged inputs of every kind that the package reads: right results, refusals, and what must not be.

    .venv/bin/python scripts/dev/fuzz.py --out fuzz --corpus fuzz-corpus       half an hour on two cores
    .venv/bin/python scripts/dev/fuzz.py --kind adapters --count 50 --show 10
    .venv/bin/python scripts/dev/fuzz.py --kind adapters --seed 4711           one of them again, with its files

Each is a function of its kind and number. Whatever is neither right nor refused in one line is kept in the corpus, and
tried first when the script runs again. docs/reliability.md has results.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.fuzz import examine

examine.watch_safetensors()  # before anything imports the library's function

import torch  # noqa: E402
import vllm.config.lora  # noqa: E402, F401  (adapters and generation_config.json are read by vLLM as well)
from vllm.config import ModelConfig  # noqa: E402

from tests.support.fuzz import kinds, model_kinds  # noqa: E402
from vllm_bailing.config import register_with_transformers  # noqa: E402

KINDS = {**model_kinds.KINDS, **kinds.KINDS}
# Of ten thousand.
SHARES = {
    "config.json": 1700,
    "--hf-overrides": 1000,
    "index of the weights": 700,
    "headers of the weights": 1000,
    "headers of quantized weights": 600,
    "small MTP checkpoints": 700,
    "quantization": 900,
    "adapters": 1000,
    "answers, for the parsers": 1000,
}
OTHERS = 250  # of each other kind
SPARE_BYTES = 2**30  # that a reader may take
BATCH, SILENCE = 50, 100  # inputs for a process; seconds after which it is given up


def seeds_of(name: str, count: int, first: int, corpus: Path) -> list[int]:
    """Numbers of the inputs: those that are kept, and `count` from `first` on."""
    kept = sorted(int(folder.name) for folder in (corpus / name.replace("/", " ")).glob("[0-9]*"))
    return kept + [seed for seed in range(first, first + count) if seed not in kept]


def worker(name: str, seeds: list[int], results: Any) -> None:
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    most = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    kind = KINDS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as parent:
        for seed in seeds:
            results.send((seed, "began", ""))
            folder = examine.folder_for(kind, name, seed, Path(parent))
            verdict, detail = examine.examine(kind, folder)
            results.send((seed, verdict, detail))
            shutil.rmtree(folder, ignore_errors=True)


def verdicts(name: str, seeds: list[int]) -> dict[int, tuple[str, str]]:
    """What became of each, from processes that may die of them."""
    context, found = multiprocessing.get_context("fork"), {}
    while todo := [seed for seed in seeds if seed not in found][:BATCH]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(name, todo, theirs))
        process.start()
        theirs.close()
        current = todo[0]
        try:
            while ours.poll(SILENCE):
                seed, verdict, detail = ours.recv()
                current = seed
                if verdict != "began":
                    found[seed] = verdict, detail
            found.setdefault(current, ("hang", f"nothing for {SILENCE} s"))
        except EOFError:
            process.join()
            if process.exitcode:
                found.setdefault(current, ("traceback", f"the process died: {process.exitcode}"))
        if process.is_alive():
            process.kill()
        process.join()
    return found


def keep(name: str, seed: int, verdict: str, detail: str, corpus: Path) -> None:
    folder = corpus / name.replace("/", " ") / str(seed)
    if folder.exists():
        return
    folder.mkdir(parents=True)
    (folder / "verdict").write_text(f"{verdict}\n{detail}\n", errors="backslashreplace")


def table(counts: dict[str, Counter[str]]) -> str:
    bad = [verdict for verdict in examine.VERDICTS if verdict not in examine.GOOD]
    lines = [f"| what | inputs | right | refused | {' | '.join(bad)} |", f"|---|{'---|' * (3 + len(bad))}"]
    total: Counter[str] = Counter()
    for name, found in counts.items():
        total += found
        lines.append(_row(name, found, bad))
    return "\n".join([*lines, _row("all", total, bad)])


def _row(name: str, found: Counter[str], bad: list[str]) -> str:
    return f"| {name} | {found.total():,} | " + " | ".join(f"{found[key]:,}" for key in (*examine.GOOD, *bad)) + " |"


def main(
    kind: Annotated[list[str] | None, typer.Option(help=", ".join(KINDS))] = None,
    count: Annotated[int, typer.Option(help="Of each kind; 10,000 of all by default.")] = 0,
    first: Annotated[int, typer.Option(help="Number of the first.")] = 0,
    seed: Annotated[int | None, typer.Option(help="This one alone; its files are kept.")] = None,
    corpus: Path = Path("fuzz-corpus"),
    out: Annotated[Path | None, typer.Option(help="Where to write NAME.json.")] = None,
    show: Annotated[int, typer.Option(help="How many of each kind's finds to print.")] = 3,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    register_with_transformers()
    for name in (model_kinds._small_checkpoint, model_kinds._draft_checkpoint, kinds._tokenizer):
        name()
    kinds._cache["vllm_config"] = ModelConfig(str(model_kinds.DEMO))
    if seed is not None:
        (name,) = kind or ()
        folder = examine.folder_for(KINDS[name], name, seed, Path(tempfile.gettempdir()))
        print(folder, *examine.examine(KINDS[name], folder), sep="\n")
        return
    counts, finds, began = {}, {}, time.monotonic()
    for name in kind or KINDS:
        found = verdicts(name, seeds_of(name, count or SHARES.get(name, OTHERS), first, corpus))
        counts[name] = Counter(verdict for verdict, _ in found.values())
        finds[name] = {key: one for key, one in found.items() if one[0] not in examine.GOOD}
        print(f"{name}: {dict(counts[name])}", flush=True)
        for key, (verdict, detail) in finds[name].items():
            keep(name, key, verdict, detail, corpus)
        for key, (verdict, detail) in list(finds[name].items())[:show]:
            print(f"  {key} {verdict}: {detail[-1500:]!a}", flush=True)
        if out:  # after each kind, for runs that are stopped
            done = {"counts": {name: dict(found) for name, found in counts.items()}, "finds": finds}
            Path(f"{out}.json").write_text(json.dumps(done, indent=1))
    print(table(counts))
    print(f"{time.monotonic() - began:.0f} s")
    raise typer.Exit(any(finds.values()))


if __name__ == "__main__":
    typer.run(main)
