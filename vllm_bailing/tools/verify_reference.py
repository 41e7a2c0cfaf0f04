"""The plain reference over a checkpoint of any size: log-probabilities, their rounding, what each part does to them.

One layer's attention, router and shared experts and one routed expert are in memory at a time, beside the hidden states
of all prompts, so that a machine which cannot serve a checkpoint can verify it. Forward, each layer sees the prompts
exactly (fp32) and in a few copies whose values are rounded at random as finely as the deployment rounds; the copies'
differences are those of a right deployment. Backward, the layers are read once more, and each multiplies what its parts
give by numbers that are one: the derivatives of a sum of log-probabilities by these numbers say which part could have
made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm_bailing import reference
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import VerifyError
from vllm_bailing.tensor_names import EMBEDDING, HEAD
from vllm_bailing.tools.verify_statistics import MANTISSA
from vllm_bailing.tools.verify_tensors import TensorReader, stored_quantization

COPIES = 4
_ROWS = 16384  # of the head at once


@dataclass(frozen=True)
class Rounding:
    """What a deployment rounds.

    Attributes:
        dtype: Of its activations.
        inputs: Of what its quantized layers multiply: "fp8", "int8" with a scale for each token, "int8 by 128" with one
            for so many inputs, or None for `dtype`.
        fused_experts: Whether experts keep in fp32 what is inside them on CPUs: in vLLM before 0.30, where router and
            experts were one function, and in kernels of this package.
    """

    dtype: str
    inputs: str | None = None
    fused_experts: bool = False

    @classmethod
    def possible(cls, config: BailingMoeV2Config, dtype: str, vllm: str | None = None) -> list[Rounding]:
        """What a deployment may round: that of `of`, and what kernels for CPUs do, which no server tells.

        Without AVX-512 those for int8 and fp8 keep more digits of inputs than the scheme says. Those for int4 keep
        fewer, by 128 inputs in kernels of this package (`plugin/kernels/avx2.py`) and by tokens in vLLM's with AMX.
        Kernels of this package keep what is inside experts.
        """
        usual = cls.of(config, dtype, vllm)
        if config.stored_quantization_config:
            return [usual]
        others = [replace(usual, inputs=None, fused_experts=True)] if usual.inputs and dtype != "fp8" else []
        if _has_int4(config):
            others += [replace(usual, inputs="int8 by 128", fused_experts=True), replace(usual, inputs="int8")]
        return [usual, *(one for one in others if one != usual)]

    @classmethod
    def of(cls, config: BailingMoeV2Config, dtype: str, vllm: str | None = None) -> Rounding:
        """Of a deployment that computes in `dtype`; "fp8" is bf16 with what quantized layers multiply in fp8.

        Args:
            vllm: Its version of vLLM, if that is known.
        """
        fused = vllm is not None and _is_before(vllm, (0, 30))
        if dtype == "fp8":
            return cls("bfloat16", "fp8", fused)
        return cls(dtype, None if config.stored_quantization_config else _rounded_inputs(config), fused)


def _is_before(version: str, release: tuple[int, ...]) -> bool:
    """False for a build from a checkout, which may say nothing of its release."""
    try:
        found = Version(version)
    except InvalidVersion:
        return False
    return not found.is_devrelease and found.release < release


def _rounded_inputs(config: BailingMoeV2Config) -> str | None:
    """What the kernels of a quantized checkpoint round their inputs to, by its `quantization_config`."""
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") == "fp8":
        return "fp8"
    groups = [group.get("input_activations") for group in stored.get("config_groups", {}).values()]
    kinds = {"fp8" if group.get("type") == "float" else "int8" for group in groups if group}
    return "int8" if "int8" in kinds else next(iter(kinds), None)


def _has_int4(config: BailingMoeV2Config) -> bool:
    """Whether weights are integers of four bits, by `quantization_config`."""
    stored = getattr(config, "quantization_config", None) or {}
    weights = [group.get("weights") or {} for group in stored.get("config_groups", {}).values()]
    return stored.get("quant_method") in ("gptq", "awq") or any(
        one.get("num_bits") == 4 and one.get("type") == "int" for one in weights
    )


def dithered(x: Tensor, bits: int) -> Tensor:
    """`x`, in fp32, with errors as large as those of rounding to `bits` bits of mantissa, and at random."""
    return torch.rand_like(x).sub_(0.5).mul_(_powers(x)).mul_(2.0**-bits).add_(x)


def cut(x: Tensor, bits: int) -> Tensor:
    """As `dithered`, with errors of rounding toward zero, which are twice as large and make everything smaller."""
    return torch.rand_like(x).mul_(_powers(x)).mul_(-(2.0**-bits)).add_(x)


def _powers(x: Tensor) -> Tensor:
    """The powers of two of fp32 numbers, with their signs: sign and exponent alone."""
    return (x.contiguous().view(torch.int32) & -(1 << 23)).view(torch.float32)


def _dithered_input(x: Tensor, inputs: str) -> Tensor:
    if inputs == "fp8":
        return dithered(x, 3)
    size = x.shape[-1]
    width = size if inputs == "int8" else 128 if size % 128 == 0 else 32
    parts = x.unflatten(-1, (-1, width))
    return (parts + (torch.rand_like(parts) - 0.5) * parts.abs().amax(-1, keepdim=True) / 127).flatten(-2)


# ---- a layer --------------------------------------------------------------------------------------------------


class _Experts(nn.Module):
    """Routed experts that are read when they are called, and once more by a backward pass through them."""

    def __init__(self, reader: TensorReader, prefix: str, prepare: Callable[[nn.Module, str], object]) -> None:
        super().__init__()
        self.reader, self.prefix, self.prepare = reader, prefix, prepare

    def __getitem__(self, expert: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            config, prefix = self.reader.config, f"{self.prefix}.{expert}"
            with torch.device("meta"):
                empty = reference.BailingMoeV2MLP(config.hidden_size, config.moe_intermediate_size)
            module = self.reader.fill(empty, prefix)
            self.prepare(module, prefix)
            return module(x)

        return lambda x: checkpoint(run, x, use_reentrant=False) if torch.is_grad_enabled() else run(x)


def _layer(
    reader: TensorReader, index: int, prepare: Callable[[nn.Module, str], object] = lambda module, prefix: None
) -> Any:
    """Decoder layer `index` in fp32; `prepare` gets it and each of its experts, with the prefix of its names."""
    config, prefix = reader.config, f"model.layers.{index}"
    is_mtp = index in config.mtp_layer_ids
    with torch.device("meta"):
        layer = (reference.BailingMoeV2MTPLayer if is_mtp else reference.BailingMoeV2DecoderLayer)(config, index)
    if index >= config.first_k_dense_replace:
        experts = _Experts(reader, f"{prefix}.mlp.experts", prepare)
        layer.mlp.experts = experts  # pyright: ignore[reportAttributeAccessIssue]
    reader.fill(layer, prefix)
    prepare(layer, prefix)
    return layer


class _Rounded:
    """Hooks that round at random what the modules of a layer take and give.

    Args:
        toward_zero: As vLLM's own operations do in bf16 on CPUs without AVX-512; linear layers are PyTorch's.
    """

    def __init__(self, reader: TensorReader, rounding: Rounding, toward_zero: bool) -> None:
        self.reader, self.bits, self.inputs = reader, MANTISSA[rounding.dtype], rounding.inputs
        self.round, self.fused_experts = cut if toward_zero else dithered, rounding.fused_experts
        # A plain checkpoint that is served with quantized layers has its weights rounded at the start.
        self.at_start = self.inputs is not None and stored_quantization(reader.config) is None

    def __call__(self, module: nn.Module, prefix: str) -> None:
        in_experts = ".mlp.experts." in prefix
        for name, part in module.named_modules():
            if isinstance(part, reference.BailingMoeV2RMSNorm):
                is_turned = name.endswith(("query_layernorm", "key_layernorm"))
                part.register_forward_hook(lambda _m, _args, output, t=is_turned: self._normed(output, t))
            if isinstance(part, nn.Linear):
                given = self.round if in_experts and not self.fused_experts else dithered
                part.register_forward_hook(lambda _m, _args, output, f=given: f(output, self.bits))
                quantized = self.at_start or self.reader.is_quantized(f"{prefix}.{name}.weight")
                if self.at_start:
                    part.weight.data = dithered(part.weight.data, 3)
                # The others' inputs come from a norm and are rounded already.
                computed = name.endswith(("dense", "down_proj"))
                part.register_forward_pre_hook(lambda _m, args, q=quantized, c=computed: self._input(args[0], q, c))
        if isinstance(module, reference.BailingMoeV2DecoderLayer):
            # The residual stream is rounded after the attention too.
            stream: list[Tensor] = []
            module.register_forward_pre_hook(lambda _m, args: stream.__setitem__(slice(None), args[:1]))
            module.attention.register_forward_hook(lambda _m, _args, out: self._added(stream[0], out))

    def _normed(self, x: Tensor, is_turned: bool) -> Tensor:
        x, width = self.round(x, self.bits), self.reader.config.rotary_dim
        # The channels of queries and keys that are turned are rounded again then, and the others are not.
        return torch.cat((self.round(x[..., :width], self.bits), x[..., width:]), -1) if is_turned else x

    def _input(self, x: Tensor, quantized: bool, computed: bool) -> Tensor:
        x = self.round(x, self.bits) if computed else x
        return _dithered_input(x, self.inputs) if quantized and self.inputs else x

    def _added(self, stream: Tensor, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return self.round(stream + output[0], self.bits) - stream, *output[1:]


# ---- forward --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Sequences, and the token ids whose log-probabilities are wanted at each position but a sequence's first.

    Attributes:
        sequences: Token ids.
        position: Of every wanted value, counted over all sequences: int64 [V].
        token: Its token id: int64 [V].
    """

    sequences: list[list[int]]
    position: np.ndarray
    token: np.ndarray

    @classmethod
    def of(cls, sequences: list[list[int]], wanted: list[list[int]]) -> Asked:
        """Of a list of token ids for each position."""
        position = np.repeat(np.arange(len(wanted)), [len(ids) for ids in wanted])
        return cls(sequences, position, np.fromiter((one for ids in wanted for one in ids), np.int64, len(position)))

    @property
    def positions(self) -> int:
        """How many, over all sequences."""
        return sum(len(ids) - 1 for ids in self.sequences)

    @property
    def given(self) -> np.ndarray:
        """The last token before each position [N]."""
        return np.array([token for ids in self.sequences for token in ids[:-1]])

    def mask(self) -> Tensor:
        """[B, T], 0 at padding."""
        lengths = torch.tensor([len(ids) for ids in self.sequences])
        return (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()


@dataclass(frozen=True)
class Computed:
    """What the reference gives.

    Attributes:
        logprobs: Of the wanted values, exact: float64 [V].
        copies: The same of the copies that are rounded to the nearest: float64 [copies, V].
        cut: The same of those that are rounded toward zero; as many in bf16, else none.
        coarse: Whether what quantized layers multiply is rounded to 8 bits.
        likeliest: Token id for each position.
        experts: Of every MoE layer, the share of its experts that a token went to.
    """

    logprobs: np.ndarray
    copies: np.ndarray
    cut: np.ndarray
    likeliest: np.ndarray
    experts: list[float]
    coarse: bool = False


@dataclass(frozen=True)
class _Answer:
    """A sequence, by its number, whose answer took drafts.

    Row i of the MTP layer's input drafts what follows token i + 1, so the first draft is that of `start` - 1.
    """

    number: int
    start: int
    token_ids: list[int]

    @property
    def drafted(self) -> int:
        """How many tokens of the answer a draft may follow."""
        return len(self.token_ids) - self.start - 1

    def padded(self, length: int) -> list[int]:
        return self.token_ids + [0] * (length - len(self.token_ids))

    def rows(self, length: int) -> list[int]:
        """Those that draft, padded with the first."""
        return [self.start - 1 + (at if at < self.drafted else 0) for at in range(length)]


class Reference:
    """The reference over some sequences.

    Args:
        work: Folder for the hidden states after every layer, from which an interrupted run continues, and from which
            the backward pass begins at each layer.
        progress: Called with the number of steps that are done.
    Raises:
        CheckpointError: As from `TensorReader`.
        VerifyError: From `forward`, if weights are such that it gives no numbers.
    """

    def __init__(
        self,
        folder: Path,
        config: BailingMoeV2Config,
        asked: Asked,
        work: Path,
        rounding: Rounding,
        progress: Callable[[int], object] = lambda done: None,
    ) -> None:
        self.reader, self.config, self.asked, self.work = TensorReader(folder, config), config, asked, work
        self.rounding, self.progress, self.mask = rounding, progress, asked.mask()
        work.mkdir(parents=True, exist_ok=True)

    def _around(self, repeats: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """Cosines, sines and mask of the attention, for so many repetitions of the sequences."""
        mask = self.mask.repeat(repeats, 1)
        if positions is None:
            positions = reference.BailingMoeV2ForCausalLM._positions(mask, mask.shape[1], 0, mask.device)
        return *reference.rotary_cos_sin(self.config, positions), reference.attention_mask_4d(
            mask, mask.shape[1], 0, mask.device
        )

    @property
    def _kinds(self) -> tuple[bool, ...]:
        """Of the rounded copies, whether toward zero; as many are of each kind."""
        return (False, True) if self.rounding.dtype == "bfloat16" else (False,)

    @torch.no_grad()
    def forward(self, copies: int = COPIES) -> Computed:
        """All layers and the head; `copies` is how many rounded ones of a kind run beside the exact one."""
        done, rounded, experts = self._resumed() or (0, None, {})
        exact = self._state(done) if done else self._embedded()
        kinds = self._kinds
        if rounded is None:
            rounded = exact.repeat(copies * len(kinds), 1, 1)
        around = self._around(1)
        for index in range(done, self.config.num_hidden_layers):
            self.progress(index)
            if index == 0:
                self._keep_state(0, exact)
            exact, routing = _layer(self.reader, index)(exact, *around)
            if routing is not None:
                seen = routing[0][self.mask.flatten().bool()].unique().numel()
                experts[index] = seen / self.config.num_experts
            if copies:
                halves = zip(rounded.chunk(len(kinds)), kinds, strict=True)
                rounded = torch.cat([self._rounded_layer(index, *half) for half in halves])
            self.reader.close()
            self._require_finite(exact[self.mask.bool()], f"in layer {index}")
            self._keep_state(index + 1, exact)
            self._keep_rounded(index + 1, rounded, experts)
        self.progress(self.config.num_hidden_layers)
        norm = self._norm()
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.num_hidden_layers)
            bits = MANTISSA[self.rounding.dtype]
            rows = [self._predicting(norm(exact))]
            for number, each in enumerate(rounded.chunk(copies * len(kinds)) if copies else ()):
                round_it = cut if number >= copies else dithered
                rows.append(round_it(self._predicting(norm(each)), bits))
            logprobs, likeliest = self._head(torch.stack(rows), bits)
        self.reader.close()
        self._require_finite(torch.from_numpy(logprobs[0]), "in the final norm or the head")
        shares = [experts[index] for index in sorted(experts)]
        rounded_ones = logprobs[1 : copies + 1], logprobs[copies + 1 :]
        return Computed(logprobs[0], *rounded_ones, likeliest, shares, self.rounding.inputs is not None)

    def _require_finite(self, values: Tensor, where: str) -> None:
        if not values.isfinite().all():
            folder = self.reader.folder
            raise VerifyError(
                f"the reference gives NaN or infinity {where}: weights of {folder} are damaged; see `vllm-bailing "
                f"doctor {folder} --deep`"
            )

    def _rounded_layer(self, index: int, rounded: Tensor, to_zero: bool) -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(index)
            hooks = _Rounded(self.reader, self.rounding, to_zero)
            # Copies are deployments: each rounds its weights anew if it rounds them.
            apart = rounded.split(len(self.mask)) if hooks.at_start else [rounded]
            around = self._around(len(apart[0]) // len(self.mask))
            outputs = [_layer(self.reader, index, hooks)(one, *around)[0] for one in apart]
            return hooks.round(torch.cat(outputs), hooks.bits)

    @torch.no_grad()
    def drafts(self, prompts: list[int], count: int) -> list[Tensor]:
        """What the MTP layer drafts after each token of an answer but the last; after `forward`.

        Args:
            prompts: Length of the prompt in each sequence; the rest is the answer.
            count: Tokens that are drafted at a time.
        Returns:
            For each sequence int64 [copies + 1, answered - 1, count], the exact reference's first; of those whose
            answer has more than one token, since others take no draft.
        """
        layers, rounded, _ = self._resumed() or (0, torch.empty(0), {})
        assert layers == self.config.num_hidden_layers, "after forward"
        answers = [
            _Answer(number, start, ids)
            for number, (start, ids) in enumerate(zip(prompts, self.asked.sequences, strict=True))
            if len(ids) > start + 1
        ]
        norm = self._norm()
        found = [self._drafted(norm(self._state(layers)), answers, count, None)]
        with torch.random.fork_rng([]):
            torch.manual_seed(layers + 1)
            for part, to_zero in zip(rounded.chunk(len(self._kinds)), self._kinds, strict=True):
                hooks = _Rounded(self.reader, self.rounding, to_zero)
                for one in part.split(len(self.mask) if hooks.at_start else len(part)):
                    found.append(self._drafted(hooks.round(norm(one), hooks.bits), answers, count, hooks))
        self.reader.close()
        drafted = torch.cat(found)
        return [drafted[:, row, : one.drafted] for row, one in enumerate(answers)]

    def _drafted(self, state: Tensor, answers: list[_Answer], count: int, hooks: _Rounded | None) -> Tensor:
        """`drafts` of some copies, padded: int64 [C, answers, drafted, count].

        What is drafted after the first draft follows a draft, and sees the tokens that came before it and no other
        draft; so all of them can stand behind the tokens of their sequence, with a mask.

        Args:
            state: [C * B, T, H] after the last layer's final norm.
            hooks: Of its rounding; None for the exact one.
        """
        layer: Any = _layer(self.reader, self.config.num_hidden_layers, *([hooks] if hooks else []))
        tokens, width = max(len(one.token_ids) for one in answers) - 1, max(one.drafted for one in answers)
        repeats = len(state) // len(self.mask)
        given = torch.tensor([one.padded(tokens + 1) for one in answers])[:, 1:]
        state = state.unflatten(0, (repeats, -1))[:, [one.number for one in answers], :tokens].flatten(0, 1)
        joined = layer.join(self._embedding_of(given.repeat(repeats, 1)), state)
        first = torch.tensor([one.rows(width) for one in answers]).repeat(repeats, 1)  # [N, width]
        every, own = torch.arange(len(first))[:, None], torch.eye(width, dtype=torch.bool).repeat(len(first), 1, 1)
        positions = torch.arange(tokens).repeat(len(first), 1)
        sees = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(len(first), 1, 1)
        drafted, at = list[Tensor](), first
        for step in range(1, count + 1):
            output = layer(joined, *reference.rotary_cos_sin(self.config, positions), sees[:, None])[0]
            chosen = layer.final_layernorm(output[every, at])  # [N, width, H]
            drafted.append(self._likeliest(chosen, hooks.bits if hooks else None))
            if step < count:
                more = torch.cat((sees[every, at], own), 2)
                sees = torch.cat((nn.functional.pad(sees, (0, width)), more), 1)
                at = torch.arange(width).add(joined.shape[1]).repeat(len(first), 1)
                positions = torch.cat((positions, first + step), 1)
                joined = torch.cat((joined, layer.join(self._embedding_of(drafted[-1]), chosen)), 1)
        return torch.stack(drafted, -1).unflatten(0, (repeats, -1))

    def _likeliest(self, hidden_states: Tensor, bits: int | None) -> Tensor:
        """The most likely ids [B, N] for `hidden_states` [B, N, H], of logits that are rounded if `bits` is given."""
        hidden_states = hidden_states / self._head_norm()
        best = torch.full(hidden_states.shape[:2], -math.inf)
        likeliest = torch.zeros(hidden_states.shape[:2], dtype=torch.long)
        for start, weight in self._chunks():
            logits = hidden_states @ weight.T
            top, place = (logits if bits is None else dithered(logits, bits)).max(-1)
            likeliest = torch.where(top > best, place + start, likeliest)
            best = torch.maximum(best, top)
        return likeliest

    def _embedding_of(self, token_ids: Tensor) -> Tensor:
        """[..., H] of int64 [...]."""
        words, place = token_ids.unique(return_inverse=True)
        return torch.stack([self.reader.rows(EMBEDDING, one, one + 1)[0] for one in words.tolist()])[place]

    def _norm(self) -> nn.Module:
        norm = reference.BailingMoeV2RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.data = self.reader.tensor("model.norm.weight")
        return norm.requires_grad_(False)

    def _embedded(self) -> Tensor:
        hidden_states = torch.zeros(*self.mask.shape, self.config.hidden_size)
        hidden_states[self.mask.bool()] = self._embedding_of(
            torch.tensor([one for ids in self.asked.sequences for one in ids])
        )
        return hidden_states

    def _predicting(self, hidden_states: Tensor) -> Tensor:
        """[B, T, H] to [N, H]: what precedes each of the positions."""
        return torch.cat([hidden_states[row, : len(ids) - 1] for row, ids in enumerate(self.asked.sequences)])

    @property
    def _head_name(self) -> str:
        return EMBEDDING if self.config.tie_word_embeddings else HEAD

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.config.vocab_size, _ROWS):
            yield start, self.reader.rows(self._head_name, start, start + _ROWS)

    def _head_norm(self) -> Tensor | float:
        """What the channels are divided by: the length of the head's columns with norm_head."""
        if not self.config.norm_head:
            return 1.0
        return torch.as_tensor(sum(rows.pow(2).sum(0) for _, rows in self._chunks())).sqrt().clamp(min=1e-7)

    def _head(self, hidden_states: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities [C, V] of the wanted values and the most likely ids [N], for `hidden_states` [C, N, H].

        The first of C is exact, the others' logits are rounded.
        """
        hidden_states = hidden_states / self._head_norm()
        count, positions = hidden_states.shape[:2]
        normalizer = torch.full((count, positions), -math.inf)
        best, likeliest = torch.full((positions,), -math.inf), torch.zeros(positions, dtype=torch.long)
        named = torch.zeros(count, len(self.asked.token))
        position, token = torch.from_numpy(self.asked.position), torch.from_numpy(self.asked.token)
        for start, rows in self._chunks():
            here = (token >= start) & (token < start + len(rows))
            for copy in range(count):
                logits = hidden_states[copy] @ rows.T  # [N, rows]
                logits = logits if copy == 0 else dithered(logits, bits)
                normalizer[copy] = torch.logaddexp(normalizer[copy], logits.logsumexp(-1))
                named[copy, here] = logits[position[here], token[here] - start]
                if copy == 0:
                    top, place = logits.max(-1)
                    likeliest = torch.where(top > best, place + start, likeliest)
                    best = torch.maximum(best, top)
        return (named - normalizer[:, position]).double().numpy(), likeliest.numpy()

    # ---- what is kept between the layers

    def _resumed(self) -> tuple[int, Tensor, dict[int, float]] | None:
        import json

        from safetensors import safe_open

        file = self.work / "rounded.safetensors"
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata()
            experts = {int(layer): share for layer, share in json.loads(told["experts"]).items()}
            return int(told["layers"]), opened.get_tensor("rounded"), experts

    def _keep_rounded(self, layers: int, rounded: Tensor, experts: dict[int, float]) -> None:
        import json

        from safetensors.torch import save_file

        new = self.work / "rounded.safetensors.new"
        save_file({"rounded": rounded.contiguous()}, new, {"layers": str(layers), "experts": json.dumps(experts)})
        new.replace(self.work / "rounded.safetensors")

    def _keep_state(self, layer: int, exact: Tensor) -> None:
        from safetensors.torch import save_file

        save_file({"exact": exact.contiguous()}, self.work / f"exact-{layer}.safetensors")

    def _state(self, layer: int) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self.work / f"exact-{layer}.safetensors")["exact"]

    # ---- backward

    def effects(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """What each part of the model contributes to sums of log-probabilities, by derivative.

        Args:
            weights: [W, V], each of W sums' factors of the wanted values; those of a position must sum to zero.
        Returns:
            By part, such as "layer 3 attention": [W, tokens], whose sum is the derivative of the weighted sum by the
            relative size of what the part gives. The tokens are those of the input, or that went to the expert.
        """
        count, found = len(weights), {}
        grad, found["final norm"] = self._head_backward(weights)
        for index in reversed(range(self.config.num_hidden_layers)):
            self.progress(2 * self.config.num_hidden_layers - index)
            with torch.enable_grad():
                grad = self._layer_backward(index, grad, count, found)
            self.reader.close()
        return found

    def _by_sum(self, values: Tensor, count: int) -> np.ndarray:
        """[W * B, T] to [W, positions that are no padding]."""
        return values.view(count, -1)[:, self.mask.flatten().bool()].double().numpy()

    @torch.no_grad()
    def _head_backward(self, weights: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Gradient [W * B, T, H] by the last layer's output, and the effect of the final norm."""
        last = self._state(self.config.num_hidden_layers)
        norm = self._norm()
        position, token = torch.from_numpy(self.asked.position), torch.from_numpy(self.asked.token)
        factors = torch.from_numpy(weights).float()
        pulled = torch.zeros(len(weights), self.asked.positions, self.config.hidden_size)
        for start, rows in self._chunks():
            here = ((token >= start) & (token < start + len(rows))).nonzero()[:, 0]
            for some in here.split(65536):
                values = rows[token[some] - start]
                for number, factor in enumerate(factors):
                    pulled[number].index_add_(0, position[some], factor[some, None] * values)
        pulled = pulled / self._head_norm()
        whole = torch.zeros(len(weights), *last.shape)
        place = 0
        for row, ids in enumerate(self.asked.sequences):
            whole[:, row, : len(ids) - 1] = pulled[:, place : place + len(ids) - 1]
            place += len(ids) - 1
        with torch.enable_grad():
            given = last.requires_grad_()
            output = norm(given)
            grads = [torch.autograd.grad(output, given, each, retain_graph=True)[0] for each in whole]
        effect = (whole * output.detach()).sum(-1)
        return torch.cat(grads), self._by_sum(effect.flatten(0, 1), len(weights))

    def _layer_backward(self, index: int, grad: Tensor, count: int, found: dict[str, np.ndarray]) -> Tensor:
        """Gradient by the layer's input, from that by its output; adds the effects of its parts to `found`."""
        probes: dict[str, Tensor] = {}
        chosen: list[Tensor] = []
        layer = _layer(self.reader, index, lambda module, prefix: _probe(module, probes, chosen))
        state = self._state(index).repeat(count, 1, 1).requires_grad_()
        cos, sin, mask = self._around(count, self._turned(index, count, probes))
        output, _ = layer(state, cos, sin, mask)
        names = list(probes)
        grads = torch.autograd.grad(output, [state, *(probes[name] for name in names)], grad, allow_unused=True)
        shape = (state.shape[0], state.shape[1])
        for name, each in zip(names, grads[1:], strict=True):
            if each is None:
                continue
            if name == "expert":
                self._by_expert(index, each, chosen[0], count, found)
                each = each.sum(-1)
            title = f"layer {index} {'routed experts' if name == 'expert' else name}"
            found[title] = self._by_sum(each.reshape(shape), count)
        return grads[0]

    def _turned(self, index: int, count: int, probes: dict[str, Tensor]) -> Tensor:
        mask = self.mask.repeat(count, 1)
        positions = reference.BailingMoeV2ForCausalLM._positions(mask, mask.shape[1], 0, mask.device)
        probes["rotary"] = torch.ones(positions.shape, requires_grad=True)
        return positions * probes["rotary"]

    def _by_expert(self, index: int, grad: Tensor, chosen: Tensor, count: int, found: dict[str, np.ndarray]) -> None:
        """Effects of the single experts at the tokens that went to them, from those of the K of each token."""
        is_token = self.mask.flatten().bool()
        for expert in chosen.unique().tolist():
            is_its = chosen == expert
            its_tokens = is_its.any(-1).view(count, -1).any(0) & is_token
            effect = (grad * is_its).sum(-1).view(count, -1)[:, its_tokens]
            found[f"layer {index} expert {expert}"] = effect.double().numpy()


def _probe(module: nn.Module, probes: dict[str, Tensor], chosen: list[Tensor]) -> None:
    """Hooks that multiply what the parts of a layer give by ones, kept in `probes` by the part's name."""
    if not isinstance(module, reference.BailingMoeV2DecoderLayer):
        return

    def one(name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        probes[name] = like.new_ones(shape, requires_grad=True)
        return probes[name]

    def output(part: nn.Module, name: str) -> None:
        def times(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            return out * one(name, out, (*out.shape[:-1], 1))

        part.register_forward_hook(times)

    def query_output(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out * one("query and key", out, (out.shape[0], 1, out.shape[2], 1))

    def gate_output(_module: nn.Module, _args: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        chosen.append(out[0])
        return out[0], out[1] * one("expert", out[1], tuple(out[1].shape)), out[2]

    attention, mlp = module.attention, module.mlp
    output(attention.dense, "attention")
    output(module.post_attention_layernorm, "norm before the MLP")
    if isinstance(attention.query_layernorm, reference.BailingMoeV2RMSNorm):
        attention.query_layernorm.register_forward_hook(query_output)
    if isinstance(mlp, reference.BailingMoeV2SparseMoe):
        mlp.gate.register_forward_hook(gate_output)
        mlp.gate.register_forward_pre_hook(lambda _m, args: args[0] * one("router", args[0], (len(args[0]), 1)))
        if mlp.shared_experts is not None:
            output(mlp.shared_experts, "shared experts")
    else:
        output(mlp, "MLP")
