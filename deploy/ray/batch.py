"""Answers to a file of conversations, by Ray Data over all machines of a Ray cluster, or over this one.

    python deploy/ray/batch.py inclusionAI/Ling-flash-2.0 prompts.jsonl answers --engine '{"tensor_parallel_size": 4}'

Each line of the file has an "id" of its own and "messages". Answers come as lines of JSON in answers/answers, in the
order in which they are ready. What was written is noted in answers/done: after an interruption the same command does
the rest, and after the end nothing. All machines have to see both folders, and have vllm-bailing and ray[data].
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub name or folder of the checkpoint")
    parser.add_argument("prompts", type=Path, help="JSONL with id and messages")
    parser.add_argument("out", type=Path, help="folder of the answers")
    parser.add_argument("--engines", type=int, default=1, help="how many, over all machines (default 1)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="arguments of vLLM's engine")
    parser.add_argument("--sampling", type=json.loads, default={}, metavar="JSON", help="vLLM's sampling parameters")
    parser.add_argument("--rows", type=int, default=64, help="that are written, or lost by a failure, together")
    parser.add_argument("--cpu", action="store_true", help="for vLLM's CPU build")
    return parser.parse_args()


def asked(prompts: Path) -> list[str]:
    """The ids of the prompts; ends the command where they cannot tell prompts apart."""
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    bad = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict) or {"id", "messages"} - row.keys()]
    if bad:
        raise SystemExit(f"batch: row {bad[0]} of {prompts} needs an id and messages")
    if twice := [name for name, count in Counter(str(row["id"]) for row in rows).items() if count > 1]:
        raise SystemExit(f"batch: {prompts} has the id {twice[0]!r} more than once")
    return [str(row["id"]) for row in rows]


def answered(folder: Path) -> list[dict[str, Any]]:
    """The answers that were written; the last line of a file may be cut off by an interruption."""
    lines = [line for file in sorted(folder.glob("*.json")) for line in file.open(encoding="utf-8")]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def answer_all(options: argparse.Namespace) -> None:
    passed = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "HF_"))}
    passed.pop("VLLM_HOST_IP", None)  # of this machine alone
    ray.init(runtime_env={"env_vars": passed})
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(options.out / "done"), delete_checkpoint_on_success=False
    )
    config = vLLMEngineProcessorConfig(
        model_source=options.model,
        engine_kwargs=options.engine,
        concurrency=(options.engines, options.engines),  # a number would be the most, after one to begin with
        batch_size=options.rows,
        should_continue_on_error=True,  # a prompt that is too long is an error in its line, not the end of all
        tokenize_stage=False,  # vLLM does both
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": 1}]} if options.cpu else None,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"messages": row["messages"], "sampling_params": options.sampling},
        postprocess=lambda row: {
            "id": row["id"],
            "answer": row["generated_text"],
            "tokens": row["num_generated_tokens"],
            "error": row["__inference_error__"],
        },
    )
    conversations = ray.data.read_json(str(options.prompts))  # not lines=True: CheckpointConfig wants Arrow
    processor(conversations.repartition(target_num_rows_per_block=options.rows)).write_json(
        str(options.out / "answers"), mode="append"
    )


def main() -> None:
    options = arguments()
    options.out, options.prompts = options.out.absolute(), options.prompts.absolute()
    wanted = Counter(asked(options.prompts))
    if wanted - Counter(str(row["id"]) for row in answered(options.out / "answers")):
        answer_all(options)
    rows = answered(options.out / "answers")
    missing = wanted - Counter(str(row["id"]) for row in rows)
    twice, failed = len(rows) - len({row["id"] for row in rows}), sum(bool(row["error"]) for row in rows)
    found = f"{len(missing)} missing, {twice} twice, {failed} with an error"
    print(f"{len(rows)} answers to {len(wanted)} prompts: {found}")
    raise SystemExit(bool(missing or twice or failed))


if __name__ == "__main__":
    main()
