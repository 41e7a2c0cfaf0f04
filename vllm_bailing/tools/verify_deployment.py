"""What a deployment computes, as `vllm-bailing verify` compares it: log-probabilities of prompts and greedy answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bailing.errors import ChatError, VerifyError, shown
from vllm_bailing.units import dtype_name

TOP = 20  # log-probabilities per position, what vLLM's server allows by default


@dataclass(frozen=True)
class Served:
    """A sequence as the deployment computed it.

    Attributes:
        token_ids: Prompt and answer.
        top: For every position but the first, log-probabilities by token id: the `TOP` most likely tokens
            and the token actually at that position.
    """

    token_ids: list[int]
    top: list[dict[int, float]]


def prompt_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of user messages, in the checkpoint's chat template where it has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def ask_server(url: str, model: str | None, prompts: list[list[int]], max_tokens: int) -> Iterator[Served]:
    """What a running vLLM server computes for each of `prompts`, and for its greedy answer to it.

    Raises:
        VerifyError: If there is no server, or it gives no log-probabilities.
    """
    from openai import OpenAIError

    from vllm_bailing.tools.chat import connect, first_model

    client = connect(url, max_retries=1)
    try:
        name = model or first_model(client)
        for prompt in prompts:
            answer = client.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=0,
                logprobs=TOP,
                extra_body={"prompt_logprobs": TOP, "return_tokens_as_token_ids": True, "repetition_penalty": 1.0},
            ).choices[0]
            table: Any = getattr(answer, "prompt_logprobs", None)
            if not table or answer.logprobs is None:
                raise VerifyError(f"{url} returned no prompt_logprobs; it must be a vLLM server")
            top = [{int(token): entry["logprob"] for token, entry in row.items()} for row in table[1:]]
            answer_ids = [int(token.removeprefix("token_id:")) for token in answer.logprobs.tokens or []]
            for token, logprob, row in zip(
                answer_ids, answer.logprobs.token_logprobs or [], answer.logprobs.top_logprobs or [], strict=True
            ):
                likeliest = {int(label.removeprefix("token_id:")): value for label, value in row.items()}
                top.append({**likeliest, token: logprob})
            yield Served(prompt + answer_ids, top)
    except ChatError as error:
        raise VerifyError(f"{url}: {error}") from None
    # The library believes what it is sent: a web page, or JSON of another kind, ends somewhere in it or here.
    except (OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = shown(error if isinstance(error, OpenAIError) else f"{type(error).__name__}: {error}")
        raise VerifyError(f"{url} did not answer as a vLLM server does: {reason}") from None


def ask_again(
    url: str, model: str | None, prompts: list[list[int]], before: list[Served], max_tokens: int
) -> Iterator[Served]:
    """As `ask_server`, for the very sequences of an earlier run, whatever the server answers now.

    Where its answer differs, as rounding alone may make it, it is asked for the log-probabilities of the earlier one.

    Args:
        prompts, max_tokens: As for `ask_server` then.
        before: What it gave then.
    """
    for sequence, now in zip(before, ask_server(url, model, prompts, max_tokens), strict=True):
        ids = sequence.token_ids
        if now.token_ids != ids:
            (now,) = ask_server(url, model, [ids], 1)
            now = Served(ids, now.top[: len(ids) - 1])
        yield now


def ask_offline(
    folder: str, options: dict[str, Any], prompts: list[list[int]], max_tokens: int
) -> tuple[list[Served], str]:
    """What `vllm.LLM(folder, **options)` computes in this process, as `ask_server`, and its dtype."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, **{"max_logprobs": TOP, "skip_tokenizer_init": True, **options})
    params = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=TOP, prompt_logprobs=TOP, detokenize=False)
    served = []
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer: Any = output.outputs[0]
        rows: Any = [*(output.prompt_logprobs or [])[1:], *(answer.logprobs or [])]
        top = [{token: entry.logprob for token, entry in row.items()} for row in rows]
        served.append(Served(prompt + list(answer.token_ids), top))
    config = llm.llm_engine.model_config
    return served, "fp8" if config.quantization else dtype_name(config.dtype)
