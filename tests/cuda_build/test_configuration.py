"""The whole configuration of an engine, for every deployment and for the files of deploy/serve."""

from __future__ import annotations

import json
from typing import Any

import pytest
import serve_configs
import yaml

from tests.cuda_build import fakes
from tests.cuda_build.deployments import BUILT, CONFIGURED, FP8_BLOCKS
from tests.support.paths import ROOT

DEPLOYMENTS = {**BUILT, **CONFIGURED}
FILES = sorted((ROOT / "deploy" / "serve").glob("*.yaml"))
SAME_BUT_FOR_MEMORY = {"H200": "H100"}  # of which this has less; nothing here depends on it
NOT_OF_AN_ENGINE = ("enable-auto-tool-choice", "tool-call-parser", "reasoning-parser", "shutdown-timeout", "model")


def decisions(name: str, changes: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    config = fakes.engine_config(name, changes, **options)
    speculation = config.speculative_config
    return {
        "platform": str(config.device_config.device),
        "class": config.model_config.registry.resolve_model_cls(config.model_config.architectures, config.model_config)[
            0
        ].__module__,
        "draft": speculation and speculation.draft_model_config.architectures,
        "second runner": config.use_v2_model_runner,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "window": config.model_config.max_model_len,
        "adapted": config.lora_config and sorted(config.lora_config.target_modules),
    }


@pytest.mark.parametrize("title", DEPLOYMENTS)
def test_a_deployment_is_configured(title, forked):
    name, changes, options = DEPLOYMENTS[title]
    found = forked(decisions, name, changes, options)
    assert found["platform"] == "cuda"
    assert found["class"] == "vllm_bailing.model"
    assert found["draft"] == (["BailingMoeV2MTPModel"] if "speculative_config" in options else None)
    # vLLM's second model runner does not overlap batches.
    assert found["second runner"] == (not options.get("enable_dbo"))
    assert found["graphs"] == ("NONE" if options.get("enforce_eager") else "FULL_AND_PIECEWISE")
    if "YaRN" in title:
        assert found["window"] == 131072
    if "adapters" in title:
        assert ("experts" in found["adapted"]) == ("with experts" in title)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_planned_deployment_is_configured(file, gpu, forked):
    # What the file says, and what its comment says that the first node is given besides.
    flags = {**yaml.safe_load(file.read_text()), **serve_configs.plans()[file.stem].commands[0].flags}
    planned_for = file.stem.rpartition("x")[2]
    if SAME_BUT_FOR_MEMORY.get(planned_for, planned_for) not in (gpu, gpu.partition("-")[0]):
        pytest.skip(f"planned for {planned_for}, this is {gpu}")
    name = flags["model"].rpartition("/")[2]
    changes: dict[str, Any] = {"num_hidden_layers": 6}
    if name.endswith("-FP8"):
        name, changes = name.removesuffix("-FP8"), {**changes, **FP8_BLOCKS}
    options = {
        key.replace("-", "_"): json.loads(value) if str(value).startswith("{") else value
        for key, value in flags.items()
        if key not in NOT_OF_AN_ENGINE
    }
    found = forked(decisions, name, changes, options)
    assert (found["platform"], found["class"]) == ("cuda", "vllm_bailing.model")
