"""Everything that this package changes in vLLM while it runs. This file is the list: nothing is patched elsewhere.

In every process that registers, with effect for configurations that name a BailingMoeV2 architecture alone:

- `know_drafts`: `SpeculativeConfig.hf_config_override` and `.__post_init__`;
- `check_configurations`: entries in `MODELS_CONFIG_MAP`.

Instead of these, where vLLM's own class was asked for:

- `compare_ranks_first`: `BailingMoeV2ForCausalLM.__init__`.

In a process that reads answers with `--reasoning-parser bailing`, with effect for this parser alone:

- `hold_content_to_grammars`: `StructuredOutputManager._create_grammar`.

In a process that builds the model, by `patch_for_model`:

- `use_shipped_tables`: the environment variable `VLLM_TUNED_CONFIG_FOLDER`, on GPUs;
- `fix_draft_sampling_on_cpu`: `rejection_sampler.expand_batch_to_tokens`, in CPU engines that speculate;
- `fix_lora_base_rows_on_cpu`: `bgmv_shrink` and its two siblings, in CPU engines with adapters;
- `add_uneven_collectives_on_cpu`: `CpuCommunicator.all_gatherv` and `.reduce_scatterv`, in CPU engines with data
  parallelism or sequence-parallel experts;
- `offer_quantized_layers_on_cpu`: the classes of quantized experts in `experts.cpu_moe`, with the functions that pack
  their weights, and those of linear layers in `_POSSIBLE_FP8_BLOCK_KERNELS`, `_POSSIBLE_INT8_KERNELS` and
  `_POSSIBLE_KERNELS`, in CPU engines with quantized layers;
- `quantize_blocks_uncompiled_on_cpu`: `per_block_cast_to_fp8` of `quantization.online.fp8`, in CPU engines with
  quantized layers;
- `settle_partial_layers`: `reload.layerwise.finalize_layerwise_processing`, for models that ask for it;
- `check_adapters_while_loading`: `WorkerLoRAManager._load_adapter`, with adapters.

In a process that takes requests, with adapters:

- `check_adapters_up_front`: `InputProcessor._validate_lora`; of `OpenAIServingModels`, `init_static_loras` and
  `_check_load_lora_adapter_request`.

Objects of this model alone:

- `repack_experts_on_reload`: the quantization method of an expert layer, on CPUs;
- `hide_exchange_from_compiler`: the way into an expert layer, on CPUs whose ranks exchange tokens.

For a moment, undone afterwards:

- `experts_without_lora`: `VllmConfig.lora_config` while expert layers are built;
- `pretend_device`: `current_platform.get_device_name` and `.get_device_capability` during a question of
  `vllm-bailing tune`.

In workers that `vllm-bailing bench` starts:

- `time_model_loading`: `BaseModelLoader.load_model`.

Beside vLLM: `sys.excepthook` of the `vllm` command (`excepthook.shorten_in_vllm_command`), `sys.meta_path`
(`register.WhenImported`) and `transformers.PretrainedConfig.get_config_dict`
(`config.register_with_transformers`). What is public interface of vLLM and transformers is in `register`. The kernels
that the model's own layers take on CPUs are chosen in `kernels.cpu`, and a router that turns to fp32 tells vLLM's
record for reloads so (`router.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm_bailing import TABLES

TABLE_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"  # vLLM looks for tables of the fused experts there, then among its own

# ---- in every process that registers -------------------------------------------------------------------------------

# The SpeculativeConfig that is being made, while its draft's configuration is read.
_in_the_making: contextvars.ContextVar[Any] = contextvars.ContextVar("_in_the_making", default=None)
_original: dict[str, Any] = {}


def know_drafts(speculative_config: Any) -> Callable[[], object]:
    """Let vLLM's `SpeculativeConfig` know MTP drafts of this architecture; returns what takes that back.

    Differs:  vLLM knows the draft layers of the model types that it lists.
    Upstream: `SpeculativeConfig.hf_config_override` and `.__post_init__`, in 0.27 to 0.33.
    Remove:   when a model class can name its draft.
    """
    before = {name: speculative_config.__dict__[name] for name in ("hf_config_override", "__post_init__")}
    _original.update(hf_config_override=speculative_config.hf_config_override, post_init=before["__post_init__"])
    speculative_config.hf_config_override = staticmethod(hf_config_override)
    speculative_config.__post_init__ = _post_init

    def undo() -> None:
        for name, value in before.items():
            setattr(speculative_config, name, value)

    return undo


def check_configurations(
    config_map: dict[str, Any], base: type, settle_engine_config: Callable[[Any], None]
) -> Callable[[], object]:
    """Have what cannot run refused before an engine starts; returns what takes that back.

    Args:
        config_map, base: vLLM's `MODELS_CONFIG_MAP` and the class of its entries.
        settle_engine_config: Called with every complete `VllmConfig` of this architecture; may change it, and raise.

    Differs:  vLLM offers a plugin no check of a complete configuration.
    Upstream: `MODELS_CONFIG_MAP`, in 0.27 to 0.33.
    Remove:   when a model class can check the configuration that it gets.
    """
    from vllm_bailing.config import FAMILY

    class BailingMoeV2Checks(base):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            settle_engine_config(vllm_config)

    # vLLM makes pooling models of the one class that is registered.
    config_map.update(dict.fromkeys(FAMILY, BailingMoeV2Checks))

    def undo() -> None:
        for architecture in FAMILY:
            config_map.pop(architecture, None)

    return undo


def compare_ranks_first(model_class: Any) -> Callable[[], object]:
    """Have vLLM's own class compare its ranks before it is built; returns what takes that back.

    Differs:  vLLM does not compare ranks; one with another class than its peers would serve with them.
    Upstream: `bailing_moe.BailingMoeV2ForCausalLM.__init__`, which it inherits, in 0.27 to 0.33.
    Remove:   when vLLM compares the model classes of its ranks.
    """
    init = model_class.__init__

    @functools.wraps(init)  # vLLM looks at the arguments
    def comparing_first(self: Any, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        from vllm_bailing.plugin.agreement import check_ranks_agree

        check_ranks_agree(vllm_config, type(self))
        init(self, *args, vllm_config=vllm_config, **kwargs)

    model_class.__init__ = comparing_first
    return lambda: setattr(model_class, "__init__", init)


def _post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
    token = _in_the_making.set(self)
    try:
        return _original["post_init"](self, *args, **kwargs)
    finally:
        _in_the_making.reset(token)


def hf_config_override(hf_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `SpeculativeConfig.hf_config_override`: a BailingMoeV2 draft becomes that of its MTP layer.

    vLLM pickles this with the draft's configuration, so it must be found by its name in a module.

    Raises:
        CheckpointError: As from `speculation.mtp_draft`.
    """
    from vllm_bailing.config import BailingMoeV2Config

    draft = None
    if isinstance(hf_config, BailingMoeV2Config):
        from vllm_bailing.plugin.speculation import mtp_draft

        draft = mtp_draft(hf_config, _in_the_making.get())
    return _original["hf_config_override"](hf_config, *args, **kwargs) if draft is None else draft


# ---- in a process that reads answers with this package's reasoning parser -------------------------------------------


def hold_content_to_grammars(openings: Callable[[Any, Any], list[list[int]]]) -> None:
    """Let JSON schemas, regular expressions and required calls hold also in answers that do without reasoning.

    Differs:  where the prompt leaves it to the answer whether to reason, vLLM waits for the end of the reasoning, which
              never comes if none was opened: the answer is then not constrained at all. A reasoning parser can report
              the end only after the first token of the content, which was free.
    Upstream: `StructuredOutputManager._get_constraint_bounds` (`should_fill_bitmask` before 0.31), in 0.27 to 0.33.
    Remove:   when the grammar is applied together with what opens the reasoning; tests/serve/test_constraints.py asks
              for answers of this kind.

    Safe to call again.

    Args:
        openings: Called with vLLM's reasoning parser of a request and the ids of its prompt; token sequences that may
            open the reasoning in the answer, none if that is settled or the parser is not of this package.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_bailing.plugin.grammars import OptionalReasoning

    create_grammar = StructuredOutputManager._create_grammar
    if hasattr(create_grammar, "holds_content"):
        return

    @functools.wraps(create_grammar)
    def create(self: Any, request: Any) -> Any:
        grammar = create_grammar(self, request)
        asked = request.structured_output_request
        reasoner = self._get_reasoner(request)
        if reasoner is None or self.enable_in_reasoning or asked.reasoning_ended:
            return grammar
        ways = openings(reasoner, request.prompt_token_ids or [])
        if not ways:
            return grammar
        asked.reasoning_ended = True  # which for vLLM means that the grammar holds from the first token on
        stops = request.sampling_params.all_stop_token_ids
        return OptionalReasoning(grammar, ways, reasoner.is_reasoning_end_streaming, stops)

    create.holds_content = True  # pyright: ignore[reportAttributeAccessIssue]
    StructuredOutputManager._create_grammar = create


# ---- in a process that builds the model ----------------------------------------------------------------------------


def patch_for_model(vllm_config: Any) -> None:
    """Apply what an engine of this architecture needs. Safe to call again."""
    use_shipped_tables()
    if vllm_config.speculative_config is not None:
        fix_draft_sampling_on_cpu()
    if vllm_config.lora_config is not None:
        from vllm_bailing.plugin.lora import refuse_misfit  # registering does without

        fix_lora_base_rows_on_cpu()
        check_adapters_while_loading(refuse_misfit)
    parallel_config = vllm_config.parallel_config
    if parallel_config.data_parallel_size > 1 or parallel_config.use_sequence_parallel_moe:
        add_uneven_collectives_on_cpu()


def use_shipped_tables() -> None:
    """Point vLLM at this package's tables of the fused experts, unless the user names a folder.

    For processes that build this architecture on a GPU; vLLM reads the variable when the experts first run.

    Differs:  vLLM looks for tables in its own folder and in the one that the variable names.
    Upstream: `get_moe_configs`, in 0.27 to 0.33.
    Remove:   when a plugin can add a folder, or vLLM ships tables of these shapes.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike() and any(TABLES.glob("*.json")):
        os.environ.setdefault(TABLE_FOLDER, str(TABLES))


def fix_draft_sampling_on_cpu() -> None:
    """Make sampled answers keep their distribution when a CPU engine speculates.

    Differs:  vLLM's stand-in for a Triton kernel writes float results, such as the temperature of every draft token,
              into a copy that is dropped. Logits are then divided by whatever was in memory, with any kind of draft.
    Upstream: `_expand_kernel_impl` in `vllm/utils/cpu_triton_utils.py`, in 0.32.
    Remove:   when that returns floats; tests/engine/test_mtp_sampling.py compares the distributions.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens


def _expand_batch_to_tokens(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """Values [num_tokens] of the request that each token belongs to, from `x` [batch], one value replaced."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)


def fix_lora_base_rows_on_cpu() -> None:
    """Keep adapters away from requests without one that share a batch with them.

    Differs:  such rows have index -1, with which vLLM's CPU operations pick the last adapter.
    Upstream: pull request 48421, in 0.33.
    Remove:   when the oldest supported version has it; tests/engine/test_lora.py mixes the two in a batch.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        operation = getattr(lora_ops, name)
        if getattr(operation, "masks_base_rows", False):
            continue
        masked = _masking_base_rows(operation)
        for module in (lora_ops, punica_cpu):
            setattr(module, name, masked)


def _masking_base_rows(operation: Any) -> Any:
    def masked(inputs: Any, weights: Any, output: Any, indices: Any, *rest: Any, **options: Any) -> None:
        operation(inputs.masked_fill((indices < 0).unsqueeze(1), 0), weights, output, indices, *rest, **options)

    masked.masks_base_rows = True  # pyright: ignore[reportFunctionMemberAccess]
    return masked


def offer_quantized_layers_on_cpu(in_cpu_moe: dict[str, Any], linears: list[type]) -> None:
    """Put classes of quantized layers where vLLM looks for its own on CPUs; safe to call again.

    Args:
        in_cpu_moe: Classes of experts and functions that pack their weights, by the name that each stands for.
        linears: Of linear layers, each made of one of vLLM's, whose place it takes.

    Differs:  vLLM's own ask for AMX, which their kernels do without, and how experts are chosen, which is done before;
              for processors without AVX-512 it has none.
    Upstream: `_supports_current_device` and `_supports_routing_method` of the classes in `experts/cpu_moe.py`,
              `CPUFp8BlockScaledMMKernel.is_supported`, in 0.32 and 0.33.
    Remove:   when these ask for AVX-512 with bf16 and VNNI, and for no way of choosing, and there are such for AVX2.
    """
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.platforms import PlatformEnum

    for name, one in in_cpu_moe.items():
        setattr(cpu_moe, name, one)
    for offers in (kernels._POSSIBLE_FP8_BLOCK_KERNELS, kernels._POSSIBLE_INT8_KERNELS, kernels._POSSIBLE_KERNELS):
        offered: list[Any] = offers[PlatformEnum.CPU]  # type: ignore[assignment]
        for linear in linears:
            offered[:] = [linear if issubclass(linear, one) else one for one in offered]


def quantize_blocks_uncompiled_on_cpu() -> None:
    """Have vLLM quantize weights to fp8 blocks while they load without torch.compile; safe to call again.

    Differs:  compiled for CPUs, the function writes past the end of the scales, into whatever lies there in memory.
    Upstream: `per_block_cast_to_fp8` in `vllm/utils/deep_gemm.py`, in 0.32 and 0.33; issue 196681 of PyTorch.
    Remove:   when the oldest supported PyTorch has mended it.
    """
    from vllm.model_executor.layers.quantization.online import fp8

    module: Any = fp8
    compiled = module.per_block_cast_to_fp8
    module.per_block_cast_to_fp8 = getattr(compiled, "_torchdynamo_orig_callable", compiled)


def settle_partial_layers() -> None:
    """Have `end_update` of `model.weight_loading` called before vLLM's reload ends, and `after_update` afterwards.

    For models that have it.

    Differs:  a layer of which an update brought a part, or all but a buffer, is filled up with uninitialized memory.
    Upstream: `finalize_layerwise_processing`, in 0.27 to 0.33.
    Remove:   when it keeps what was not sent.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    finalize = layerwise.finalize_layerwise_processing
    if getattr(finalize, "settles_partial_layers", False):
        return

    @functools.wraps(finalize)
    def settled(model: Any, model_config: Any) -> None:
        weight_loading = getattr(model, "weight_loading", None)
        if weight_loading is not None:
            weight_loading.end_update()
        finalize(model, model_config)
        if weight_loading is not None:
            weight_loading.after_update()

    settled.settles_partial_layers = True  # pyright: ignore[reportAttributeAccessIssue]
    layerwise.finalize_layerwise_processing = settled


def check_adapters_while_loading(check: Callable[[Any, Any, Any], None]) -> None:
    """Have `check(model_config, lora_config, request)` called before a worker loads an adapter. Safe to call again.

    Nothing was evicted for it by then, and a refusal leaves the engine as it was.

    Differs:  vLLM checks the last part of a module's name and the rank; it ignores modules that were not prepared, and
              copies factors of any width as far as they go.
    Upstream: `WorkerLoRAManager._load_adapter`, in 0.27 to 0.33.
    Remove:   when vLLM compares adapters with the layers that they are for.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    def before(self: Any, request: Any) -> None:
        check(self._adapter_manager.model.vllm_config.model_config, self.lora_config, request)

    if not hasattr(WorkerLoRAManager._load_adapter, "is_checked"):
        WorkerLoRAManager._load_adapter = _checking_first(WorkerLoRAManager._load_adapter, before)


def check_adapters_up_front(check: Callable[[Any, Any, Any], None]) -> None:
    """Have `check(model_config, lora_config, request)` called where requests come in. Safe to call again.

    Differs:  the engine finds out what is wrong with an adapter: in a step, which ends it, or when the server loads
              one, which then answers 500.
    Upstream: `OpenAIServingModels.load_lora_adapter`, `InputProcessor._validate_lora`, in 0.27 to 0.33.
    Remove:   when vLLM checks adapters before the engine gets them, and answers 400.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_bailing.errors import AdapterError

    def before(self: Any, request: Any) -> None:
        try:
            check(self.model_config, self.lora_config, request)
        except AdapterError as error:  # the server of vLLM answers all other errors of a request with 500
            raise VLLMValidationError(str(error)) from error

    if hasattr(InputProcessor._validate_lora, "is_checked"):
        return
    InputProcessor._validate_lora = _checking_first(InputProcessor._validate_lora, before)
    with contextlib.suppress(ImportError):  # a process without a server
        from vllm.entrypoints.openai.models import serving

        _check_in_server(serving.OpenAIServingModels, serving.create_error_response, check)  # pyright: ignore[reportPrivateImportUsage]


def _checking_first(method: Any, check: Callable[[Any, Any], None]) -> Any:
    @functools.wraps(method)
    def checked(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        check(self, request)
        return method(self, request, *args, **kwargs)

    checked.is_checked = True  # pyright: ignore[reportAttributeAccessIssue]
    return checked


def _check_in_server(
    serving_models: Any, create_error_response: Callable[[Exception], Any], check: Callable[[Any, Any, Any], None]
) -> None:
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.request import LoRARequest

    load_static, check_request = serving_models.init_static_loras, serving_models._check_load_lora_adapter_request

    def check_path(self: Any, name: str, path: str) -> None:
        check(self.model_config, self.input_processor.lora_config, LoRARequest(name, 1, path))

    async def init_static_loras(self: Any) -> None:
        for adapter in self.static_lora_modules or ():
            check_path(self, adapter.name, adapter.path)
        await load_static(self)

    async def _check_load_lora_adapter_request(self: Any, request: Any) -> Any:
        refusal = await check_request(self, request)
        if refusal is not None:
            return refusal
        try:
            await asyncio.to_thread(check_path, self, request.lora_name, request.lora_path)
        except (ValueError, LoRAAdapterNotFoundError) as error:  # its own is no ValueError: it becomes 404
            return create_error_response(error)

    serving_models.init_static_loras = init_static_loras
    serving_models._check_load_lora_adapter_request = _check_load_lora_adapter_request


def add_uneven_collectives_on_cpu() -> None:
    """Let ranks of a CPU engine exchange tokens of which each has another number.

    Differs:  vLLM's communicator for CPUs has none of the two collectives that experts need under data parallelism: the
              server starts, and every request fails.
    Upstream: `CpuCommunicator.all_gatherv` and `.reduce_scatterv`, in 0.27 to 0.33.
    Remove:   when it has them; tests/engine/test_parallel.py runs both kinds of ranks.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for name, collective in (("all_gatherv", _all_gatherv), ("reduce_scatterv", _reduce_scatterv)):
        if getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name):
            setattr(CpuCommunicator, name, collective)


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The tensors of all ranks in a row; rank i has `sizes[i]` rows, all the same number if left out."""
    import torch

    if isinstance(input_, list):
        return [_all_gatherv(self, part, dim, sizes) for part in input_]
    assert dim == 0
    rows: list[int] = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros(max(rows), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in rows]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, rows, strict=True)])


def _reduce_scatterv(self: Any, input_: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
    """This rank's rows of the sum over all ranks; rank i gets `sizes[i]` of them."""
    import torch

    assert dim == 0
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].contiguous()


# ---- objects of this model alone ----------------------------------------------------------------------------------


def repack_experts_on_reload(routed_experts: Any) -> None:
    """Make `reload_weights` leave the same model on CPU.

    Differs:  vLLM packs expert weights for its CPU kernel only while the kernel is first built; on a reload it copies
              the plain weights over the packed ones, and every answer after that is wrong.
    Upstream: `UnquantizedFusedMoEMethod._setup_kernel`, up to 0.33 at least.
    Remove:   when that calls the experts' `process_weights_after_loading` on weight updates too.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    method = routed_experts.quant_method
    if not current_platform.is_cpu() or not isinstance(method, UnquantizedFusedMoEMethod):
        return
    process = method.process_weights_after_loading

    def process_weights_after_loading(layer: Any) -> None:
        method.moe_kernel = None  # what vLLM takes for "the first time"
        process(layer)

    method.process_weights_after_loading = process_weights_after_loading


def hide_exchange_from_compiler(runner: Any, parallel_config: Any) -> None:
    """Let `torch.compile` see experts as one operation on CPUs too, where their ranks exchange tokens.

    Differs:  on CPUs vLLM compiles what is inside, and how many tokens other ranks have is not known then.
    Upstream: `MoERunner._select_forward`, in 0.27 to 0.33.
    Remove:   when that tells them apart; tests/engine/test_parallel.py has a compiled case.
    """
    import torch
    from vllm.platforms import current_platform

    exchanges = parallel_config.data_parallel_size > 1 or parallel_config.enable_expert_parallel
    if current_platform.is_cpu() and exchanges:
        operations = torch.ops.vllm
        runner._forward_entry = operations.moe_forward_shared if runner.shared_experts else operations.moe_forward


# ---- for a moment --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def experts_without_lora(are_wanted: bool) -> Iterator[None]:
    """Let experts be built as if no adapters were wanted, unless they are wanted for them; other layers keep theirs.

    Differs:  with LoRA enabled vLLM picks experts that take adapters for every layer, adapted or not: CPUs have none,
              and on a B200 they are not the fastest.
    Upstream: `select_unquantized_moe_backend`, in 0.27 to 0.33.
    Remove:   when they are chosen where experts are not a LoRA target.

    Args:
        are_wanted: Whether adapters may change these experts. On CPUs they cannot.
    """
    from vllm.config import get_current_vllm_config

    vllm_config = get_current_vllm_config()
    lora_config = vllm_config.lora_config
    if lora_config is None or are_wanted:
        yield
        return
    vllm_config.lora_config = None
    try:
        yield
    finally:
        vllm_config.lora_config = lora_config


@contextlib.contextmanager
def pretend_device(name: str | None, capability: str | None = None) -> Iterator[None]:
    """Let vLLM take this machine's GPU for the one called `name`, if any, when it chooses experts and their table.

    Args:
        capability: Its compute capability, such as "9.0"; left as it is if left out.

    Differs:  it asks the machine that it runs on, and remembers the answer.
    Upstream: `get_config_file_name`, `get_moe_configs`, `select_unquantized_moe_backend` and `select_fp8_moe_backend`,
              in 0.27 to 0.33.
    Remove:   when they take the device as an argument.
    """
    from unittest import mock

    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability
    from vllm.utils.platform_utils import get_device_name_as_file_name

    if name is None:
        yield
        return
    remembering = (get_device_name_as_file_name, get_moe_configs)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(current_platform, "get_device_name", lambda *_args: name))
            if capability is not None:
                version = DeviceCapability(*map(int, capability.split(".")))
                answer = classmethod(lambda *_args, **_kwargs: version)
                stack.enter_context(mock.patch.object(type(current_platform), "get_device_capability", answer))
            for function in remembering:
                function.cache_clear()
            yield
    finally:
        for function in remembering:
            function.cache_clear()


# ---- in workers that a benchmark starts ----------------------------------------------------------------------------

_load_seconds = 0.0


def time_model_loading() -> Callable[[], float]:
    """Put a stopwatch around vLLM's loader; returns a function that reads it, in seconds. Safe to call again.

    Differs:  vLLM writes the time into its log and keeps it nowhere.
    Upstream: `BaseModelLoader.load_model`, in 0.27 to 0.33.
    Remove:   when a worker can be asked for it.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load_model = BaseModelLoader.load_model
    if not hasattr(load_model, "is_timed_by_vllm_bailing"):

        @functools.wraps(load_model)
        def timed(*args: Any, **kwargs: Any) -> Any:
            global _load_seconds
            started = time.perf_counter()
            try:
                return load_model(*args, **kwargs)
            finally:
                _load_seconds += time.perf_counter() - started

        timed.is_timed_by_vllm_bailing = True  # pyright: ignore[reportAttributeAccessIssue]
        BaseModelLoader.load_model = timed
    return lambda: _load_seconds
