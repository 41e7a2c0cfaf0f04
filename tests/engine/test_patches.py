"""What is patched in vLLM, without an engine."""

from __future__ import annotations

import contextlib

import pytest
import torch
from serve_configs import zoo_config

from tests.support.adapters import REFUSED, changed_adapter
from tests.support.checkpoints import small_config
from tests.support.engine import run
from vllm_bailing import DEMO, DEMO_ADAPTER
from vllm_bailing.adapters import LINEAR


def _low_rank_products():
    """What vLLM's operations for adapters make of rows for the adapters 0, none, and 1; and of all rows for 0 and 1."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from vllm_bailing.plugin import patches

    patches.fix_lora_base_rows_on_cpu()
    torch.manual_seed(0)
    hidden, shrunk = torch.randn(3, 16), torch.randn(3, 4)
    a, b = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 16, 4)
    found = []
    for module in (lora_ops, punica_cpu):
        for indices in ([0, -1, 1], [0, 0, 1]):
            indices = torch.tensor(indices)
            outputs = torch.zeros(3, 4), torch.ones(3, 16), torch.ones(3, 40)
            module.bgmv_shrink(hidden, a, outputs[0], indices, 2.0)
            module.bgmv_expand(shrunk, b, outputs[1], indices, True)
            module.bgmv_expand_slice(shrunk, b, outputs[2], indices, 8, 16, True)
            found.append(outputs)
    products = 2 * hidden[:, None] @ a[[0, 0, 1], 0].mT, shrunk[:, None] @ b[[0, 0, 1], 0].mT
    return found, [product[:, 0] for product in products]


def test_rows_without_an_adapter_stay_as_they_are_among_rows_with_one():
    found, (shrunk, expanded) = run(_low_rank_products)
    for (down, up, part), row in zip(found, (True, False, True, False), strict=True):
        wanted_down, wanted_up = shrunk.clone(), expanded.clone()
        if row:
            wanted_down[1], wanted_up[1] = 0, 0
        torch.testing.assert_close(down, wanted_down)
        torch.testing.assert_close(up, 1 + wanted_up)
        torch.testing.assert_close(part[:, 8:24], 1 + wanted_up)
        assert (part[:, :8] == 1).all() and (part[:, 24:] == 1).all()


def _experts_with_lora(targets, name, on_cpu):
    """(whether experts called `name` see adapters while they are built, whether all is as before after an error)."""
    from types import SimpleNamespace

    import vllm.config
    from vllm.platforms import current_platform

    from vllm_bailing.plugin import patches
    from vllm_bailing.plugin.lora import experts_take_adapters

    lora_config = SimpleNamespace(target_modules=targets)
    model_config = SimpleNamespace(hf_config=small_config(num_nextn_predict_layers=1))
    config = SimpleNamespace(lora_config=lora_config, model_config=model_config)
    vllm.config.get_current_vllm_config = lambda: config
    type(current_platform).is_cpu = lambda self: on_cpu
    seen = []
    with contextlib.suppress(KeyError), patches.experts_without_lora(experts_take_adapters(config, name)):
        seen.append(config.lora_config is lora_config)
        raise KeyError
    return seen[0], config.lora_config is lora_config


@pytest.mark.parametrize(
    ("targets", "name", "on_cpu", "sees"),
    [
        (["query_key_value", "dense", "gate_proj"], "model.layers.1.mlp.experts", False, False),
        (["dense", "experts"], "model.layers.1.mlp.experts", False, True),
        (["dense", "experts"], "model.layers.1.mlp.experts", True, False),
        (["dense", "experts"], "model.layers.3.mlp.experts", False, False),  # the draft's
        (["model.layers.2.mlp.experts"], "model.layers.2.mlp.experts", False, True),
        (["model.layers.2.mlp.experts"], "model.layers.1.mlp.experts", False, False),
    ],
)
def test_experts_are_built_for_adapters_only_where_they_take_them(targets, name, on_cpu, sees):
    """On a GPU too: vLLM's fastest experts take none."""
    assert run(_experts_with_lora, targets, name, on_cpu) == (sees, True)


def _settled(targets, on_cpu, **parallel):
    """(targets, lines of the log) after the settings of an engine for Ling-flash-2.0 were settled."""
    from types import SimpleNamespace

    import torch
    import vllm.logger

    from vllm_bailing.plugin.lora import settle_lora_targets

    lora = {"target_modules": targets, "max_loras": 4, "max_lora_rank": 64, "fully_sharded_loras": False}
    sizes = {"tensor_parallel_size": 4, "data_parallel_size": 1, "pipeline_parallel_size": 1}
    config = SimpleNamespace(
        lora_config=SimpleNamespace(lora_dtype="auto", **lora),
        model_config=SimpleNamespace(hf_config=zoo_config("Ling-flash-2.0"), dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(**{**sizes, "enable_expert_parallel": False, **parallel}),
    )
    lines = []
    logger = SimpleNamespace(info_once=lambda text, *values: lines.append(text % values))
    vllm.logger.init_logger = lambda name: logger
    settle_lora_targets(config, on_cpu, False)
    return config.lora_config.target_modules, lines


LINE = "adapters: vLLM sets {} GiB aside on each rank, for --max-loras 4 of --max-lora-rank 64 on {}"
PLAIN = "query_key_value dense gate_proj up_proj down_proj"


@pytest.mark.parametrize(
    ("targets", "options", "wanted"),
    [
        (None, {}, LINE.format("0.36", f"{PLAIN}; not experts, which --lora-target-modules can add")),
        (["experts"], {}, LINE.format("49.41", "experts")),
        (["experts"], {"pipeline_parallel_size": 2}, LINE.format("25.50", "experts")),
        (["experts"], {"enable_expert_parallel": True}, LINE.format("14.53", "experts")),
    ],
    ids=["default", "experts", "stages", "whole_experts"],
)
def test_experts_are_on_demand_and_the_log_says_what_adapters_take(targets, options, wanted):
    """49 GiB is what vLLM's own manager allocated; 31 layers have experts, 16 of them in the second of two stages."""
    found, lines = run(_settled, targets, False, **options)
    assert lines == [wanted] and " ".join(found) == (" ".join(targets) if targets else PLAIN)


def _told(folder, is_ours):
    """What vLLM's own classes say to an adapter where requests come in, without an engine; None where it passes.

    To a request to load it, to `--lora-modules`, and to a prompt that names it.
    """
    import asyncio
    from types import SimpleNamespace

    import torch
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_bailing.config import read_config
    from vllm_bailing.plugin import patches
    from vllm_bailing.plugin.lora import refuse_misfit

    for _ in range(2):  # it is safe to call again
        patches.check_adapters_up_front(refuse_misfit)
    config = read_config(DEMO) if is_ours else SimpleNamespace()
    model = SimpleNamespace(hf_config=config, dtype=torch.float32)
    lora = SimpleNamespace(target_modules=list(LINEAR), max_lora_rank=16, lora_dtype="auto")
    processor = SimpleNamespace(model_config=model, lora_config=lora, tokenizer=None)
    adapter = SimpleNamespace(name="x", path=folder, base_model_name=None, is_3d_lora_weight=False)

    async def load_lora_adapter(**given):
        return "loaded"

    server = SimpleNamespace(
        model_config=model,
        input_processor=processor,
        static_lora_modules=[adapter],
        lora_requests={},
        is_base_model=lambda name: False,
        load_lora_adapter=load_lora_adapter,
    )
    request = SimpleNamespace(lora_name="x", lora_path=folder, load_inplace=False)
    answer = asyncio.run(OpenAIServingModels._check_load_lora_adapter_request(server, request))
    told = [answer and (answer.error.code, answer.error.message)]
    for way in (
        lambda: asyncio.run(OpenAIServingModels.init_static_loras(server)),
        lambda: InputProcessor._validate_lora(processor, LoRARequest("x", 1, folder)),
    ):
        try:
            told.append(way())
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_adapters_are_checked_where_requests_come_in(tmp_path):
    bad = changed_adapter(tmp_path / "bad", REFUSED["half_of_every_a"][0])
    code, *messages = [
        part for told in run(_told, str(bad), True) for part in (told if type(told) is tuple else (told,))
    ]
    assert code == 400 and all("20 factor(s) are of the wrong shape" in message for message in messages)
    assert [message.partition(":")[0] for message in messages[1:]] == ["AdapterError", "VLLMValidationError"]
    assert run(_told, str(DEMO_ADAPTER), True) == run(_told, str(bad), False) == [None] * 3
    (code, message), *others = run(_told, str(tmp_path / "nowhere"), True)
    assert code == 404 and all("No adapter found" in one for one in (message, *others))
