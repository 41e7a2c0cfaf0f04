"""Which experts a model picks for prompts and for its own answers to them.

Dimension letters: T tokens of a request, L layers with experts, K experts per token.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_bailing.balance.trace import Trace, shape_of
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.errors import BalanceError, BenchError, ChatError, shown
from vllm_bailing.tools.prompts import Prompt
from vllm_bailing.tools.task import Task, run_task

Progress = Callable[[int], None]
_FLAG = "--enable-return-routed-experts"


def offline(
    model: str,
    config: BailingMoeV2Config,
    prompts: list[Prompt],
    max_tokens: int,
    engine: dict[str, Any],
    progress: Progress = lambda done: None,
) -> Trace:
    """The picks of `vllm.LLM(model, **engine)`, in this process, for prompts and greedy answers.

    The answers are generated first, all together; then each sequence is read once more by itself, without CUDA graphs
    and without a prefix cache, while the routers are watched.

    Raises:
        BalanceError: If the engine refuses a prompt, or its picks cannot be seen.
    """
    from vllm import LLM

    from vllm_bailing.balance.worker_extension import EXTENSION

    shape_of(config)
    fixed = {"enforce_eager": True, "enable_prefix_caching": False, "worker_extension_cls": EXTENSION}
    llm = LLM(model, **{"disable_log_stats": True, **engine, **fixed})
    try:
        sequences = _answered(llm, prompts, max_tokens)
    except ValueError as error:  # a prompt that is too long, or that the template refuses
        raise BalanceError(shown(error)) from None
    require_watched(config, llm.collective_rpc("bailing_watch_routers"))
    return _trace(model, config, _read_again(llm, config, sequences), progress)


@dataclass
class RecordTask(Task):
    """`offline` in a process of its own, which leaves the trace in a file."""

    prompts: list[dict[str, Any]]
    max_tokens: int
    file: str

    def work(self) -> None:
        prompts = [Prompt(**prompt) for prompt in self.prompts]
        offline(self.model, read_config(self.model), prompts, self.max_tokens, self.engine).save(Path(self.file))


def record_apart(model: str, prompts: list[Prompt], max_tokens: int, engine: dict[str, Any], file: Path) -> None:
    """Write what `offline` gives to `file`; nothing of the engine is left when this returns.

    Raises:
        BalanceError: If the engine did not start, or as `offline`.
    """
    try:
        run_task(RecordTask(model, engine, [asdict(prompt) for prompt in prompts], max_tokens, str(file.absolute())))
    except BenchError as error:
        raise BalanceError(str(error).removeprefix("BalanceError: ")) from None


def require_watched(config: BailingMoeV2Config, ranks: list[list[int]]) -> None:
    """Raises BalanceError if there is a layer with experts that no rank watches.

    Args:
        ranks: Numbers of the layers that each rank watches.
    """
    if unseen := sorted(set(config.moe_layer_ids).difference(*ranks)):
        raise BalanceError(
            f"the picks of layer {unseen[0]} cannot be seen: its kernel picks by itself, or this vLLM has no way to "
            'watch a router; name another kernel by --engine \'{"moe_backend": "triton"}\', or record from a server '
            f"with {_FLAG} by --url"
        )


def _answered(llm: Any, prompts: list[Prompt], max_tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    ids = [prompt.token_ids(tokenizer) for prompt in prompts]
    params = SamplingParams(max_tokens=max_tokens, temperature=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    # The last token of an answer went through no layer.
    return [[*one, *output.outputs[0].token_ids[:-1]] for one, output in zip(ids, outputs, strict=True)]


def _read_again(llm: Any, config: BailingMoeV2Config, sequences: list[list[int]]) -> Iterator[np.ndarray]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    for sequence in sequences:
        llm.generate([{"prompt_token_ids": sequence}], params, use_tqdm=False)
        layers: dict[str, bytes] = {}
        for rank in reversed(llm.collective_rpc("bailing_take_picks")):  # stages have layers of their own
            layers |= rank
        noted = [
            np.frombuffer(layers.get(str(layer), b""), np.uint16).reshape(-1, config.num_experts_per_tok)
            for layer in config.moe_layer_ids
        ]
        for layer, one in zip(config.moe_layer_ids, noted, strict=True):
            if len(one) != len(sequence):
                raise BalanceError(
                    f"layer {layer} routed {len(one)} tokens where {len(sequence)} were given; record with one "
                    "data-parallel rank, and without speculation"
                )
        yield np.stack(noted, 1)


def from_server(
    url: str,
    served_model_name: str | None,
    model: str,
    config: BailingMoeV2Config,
    prompts: list[Prompt],
    max_tokens: int,
    progress: Progress = lambda done: None,
) -> Trace:
    """The picks that a running server returns with its greedy answers.

    Args:
        model: As the user names the model of `config`.
    Raises:
        BalanceError: If it does not answer, returns none, or serves a model of another shape.
    """
    from openai import OpenAIError

    from vllm_bailing.tools.chat import connect, first_model
    from vllm_bailing.tools.no_answer import no_answer

    shape_of(config)
    client = connect(url, max_retries=1)

    def asked() -> Iterator[np.ndarray]:
        name = served_model_name or first_model(client)
        for prompt in prompts:
            messages: Any = prompt.messages
            options: dict[str, Any] = {"tools": prompt.tools} if prompt.tools else {}
            extra = {"chat_template_kwargs": prompt.template} if prompt.template else {}
            answer = client.chat.completions.create(
                model=name, messages=messages, max_tokens=max_tokens, temperature=0, extra_body=extra, **options
            )
            yield _decoded(getattr(answer.choices[0], "routed_experts", None), url, config)

    try:
        return _trace(model, config, asked(), progress)
    except (OpenAIError, ChatError) as error:
        raise BalanceError(no_answer(url, error)) from None
    except (AttributeError, LookupError, TypeError) as error:  # a web page, or JSON of another kind
        raise BalanceError(no_answer(url, error)) from None


def _decoded(text: Any, url: str, config: BailingMoeV2Config) -> np.ndarray:
    """[T, L, K] of what vLLM calls `routed_experts`: .npy [T, all layers, K] in base64."""
    if not text:
        raise BalanceError(f"{url} returns no routed experts; start it with {_FLAG}, which vLLM has for GPUs")
    try:
        picks = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    except (ValueError, TypeError, EOFError) as error:
        raise BalanceError(f"{url} returns routed experts that are no .npy file: {shown(error)}") from None
    wanted = (config.num_hidden_layers, config.num_experts_per_tok)
    if picks.ndim != 3 or picks.shape[1:] != wanted or (picks.size and not 0 <= picks.max() < config.num_experts):
        raise BalanceError(
            f"{url} serves another model: its routed experts have the shape {picks.shape}, and MODEL has {wanted[0]} "
            f"layers, {config.num_experts} experts and {wanted[1]} of them per token; name the model that it serves"
        )
    return picks[:, config.moe_layer_ids].astype(np.uint16)


def _trace(model: str, config: BailingMoeV2Config, requests: Iterable[np.ndarray], progress: Progress) -> Trace:
    recorded = []
    for request in requests:
        recorded.append(request)
        progress(len(recorded))
    picks, lengths = np.concatenate(recorded), tuple(map(len, recorded))
    name = Path(model).resolve().name if Path(model).exists() else model
    return Trace(picks, lengths, tuple(config.moe_layer_ids), shape_of(config), name)
