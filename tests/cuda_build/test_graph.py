"""Target and draft as vLLM compiles them: one graph each, and what its passes make of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from tests.cuda_build import fakes
from tests.cuda_build.deployments import DP2, FLASH, MINI_BASE, TP2, mtp

GEMM = ("aten.mm.default", "aten.addmm.default")


def lowered(graph: Any, inputs: Any, vllm_config: Any) -> list[tuple[str, str, list[str]]]:
    """(name, operation, names of its inputs) of the nodes of `graph` after vLLM's passes."""
    from torch._inductor import compile_fx, config
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config.utils import Range

    class Stop(Exception):
        pass

    manager, found = PostGradPassManager(), []
    manager.configure(vllm_config)
    plain = {"enable_auto_functionalized_v2": False}

    def inner(module: Any, *_: Any, **__: Any) -> None:
        view_to_reshape(module)
        with config.patch(post_grad_custom_post_pass=manager, **plain):
            post_grad_passes(module, is_inference=True)
        for node in module.graph.nodes:
            sources = [one.name for one in node.all_input_nodes]
            found.append((node.name, str(node.target), sources))
        raise Stop

    with pass_context(Range(1, 2048)), config.patch(plain), pytest.raises(Exception, match=""):
        compile_fx.compile_fx(graph, inputs, inner_compile=inner)
    assert found, "the graph never got to vLLM's passes"
    return found


def traced(name: str, options: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """What is compiled of the target, and of the draft if there is one."""
    from vllm.compilation import backends

    graphs: list[dict[str, Any]] = []

    def record(self: Any, graph: Any, inputs: Any) -> Any:
        pieces = backends.split_graph(graph, self.compilation_config.splitting_ops)[1]
        splitting = sum(piece.is_splitting_graph for piece in pieces)
        nodes = lowered(graph, inputs, self.vllm_config)
        graphs.append({"pieces": len(pieces), "splitting": splitting, "nodes": nodes})
        return graph

    config = fakes.engine_config(name, {"num_hidden_layers": layers}, distributed_executor_backend="mp", **options)
    with mock.patch.object(backends.VllmBackend, "__call__", record), fakes.on_gpus(config) as built:
        target = built.model
        hidden = fakes.forward(built)
        with built.mode, fakes.GPU:
            logits = target.compute_logits(hidden)
            part = target.compute_logits_local(hidden)
        assert logits.shape[0] == fakes.TOKENS
        assert part.shape == (fakes.TOKENS, target.lm_head.num_embeddings_per_partition)
        if config.speculative_config:
            draft = fakes.draft(built)
            assert draft.model.embed_tokens is target.model.embed_tokens
            assert draft.lm_head is target.lm_head
            fakes.forward(built, draft, hidden_states=(fakes.TOKENS, hidden.shape[-1]))
    return graphs


def operations(graph: dict[str, Any], part: str) -> list[tuple[str, str, list[str]]]:
    return [node for node in graph["nodes"] if part in node[1]]


@pytest.mark.parametrize(
    ("name", "options", "layers"), [(FLASH, TP2, 2), (MINI_BASE, mtp(2), 2)], ids=["flash, TP 2", "mini, MTP 2"]
)
def test_each_model_is_one_graph_without_copies(name, options, layers, gpu, forked):
    graphs = forked(traced, name, options, layers)
    has_draft = "speculative_config" in options
    assert len(graphs) == 1 + has_draft, "a graph break"
    for graph, count in zip(graphs, (layers, 1), strict=False):
        assert (graph["pieces"], graph["splitting"]) == (2 * count + 1, count)
        assert operations(graph, "auto_functionalized") == []
        producers = {name: operation for name, operation, _ in graph["nodes"]}
        fused = operations(graph, "fused_qk_norm_rope")
        assert len(fused) == (count if gpu.startswith(("H", "A", "L")) else 0)
        for _, _, sources in fused:
            assert producers[sources[0]] in GEMM, "not in place on the product"
        reduced = [node[0] for node in operations(graph, "vllm.all_reduce")]
        assert len(reduced) == (1 + 2 * count if "tensor_parallel_size" in options else 0)  # embedding, layers
        for one in reduced[1:]:
            users = {operation for _, operation, sources in graph["nodes"] if one in sources}
            assert any("fused_add_rms_norm" in user for user in users), f"{one} goes to {users}"


@pytest.mark.parametrize(
    ("stays_divided", "exchanges"),
    [
        # The embedding, three attentions and the dense layer are summed; the tokens of two MoE layers are gathered.
        (False, {"all_reduce": 5, "reduce_scatter": 0, "all_gather": 2}),
        (True, {"all_reduce": 3, "reduce_scatter": 2, "all_gather": 2}),
    ],
    ids=["as usual", "bailing_sequence_parallel"],
)
def test_tokens_that_stay_divided_are_exchanged_less(stays_divided, exchanges, forked):
    options = {**DP2, "additional_config": {"bailing_sequence_parallel": stays_divided}}
    (graph,) = forked(traced, FLASH, options, 3)
    assert {name: len(operations(graph, f"vllm.{name}.")) for name in exchanges} == exchanges


def passed_on(options: dict[str, Any]) -> tuple[list[str], bool]:
    """What the first stage gives the second for EAGLE-3, and whether vLLM lets the model have both."""
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import verify_supports_aux_hidden_states_over_pp

    config = fakes.engine_config(
        FLASH, {"num_hidden_layers": 4}, enforce_eager=True, distributed_executor_backend="mp", **options
    )
    with fakes.on_gpus(config) as built:
        built.model.set_aux_hidden_state_layers((0, 2, 3))
        verify_supports_aux_hidden_states_over_pp(built.model, "eagle3")
        return sorted(fakes.forward(built).tensors), built.model.supports_eagle3


def test_a_stage_passes_on_what_an_eagle3_draft_asks_for(forked):
    names, supported = forked(passed_on, {"pipeline_parallel_size": 2})
    assert supported and names == ["aux_hidden_states_0", "aux_hidden_states_1", "hidden_states", "residual"]
