"""What a deployment computes, as `vllm-bailing verify` compares it: log-probabilities of prompts and greedy answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bailing.errors import BenchError, ChatError, VerifyError, first_of
from vllm_bailing.tools.chat import connect, first_model, http_client, model_names
from vllm_bailing.tools.metrics import ACCEPTED, DRAFTS, counters, draft_source, samples, total
from vllm_bailing.tools.no_answer import no_answer
from vllm_bailing.tools.prompts import read_tokenizer, templated
from vllm_bailing.tools.task import Task, run_task
from vllm_bailing.tools.verify_drafts import Drafts, unlike_mtp
from vllm_bailing.units import dtype_name

if TYPE_CHECKING:
    from vllm import LLM

TOP = 20  # log-probabilities per position, what vLLM's server allows by default
WORDS = 1024  # of the vocabulary in the prompts that are no text
_RUN = 256  # of them in a prompt


@dataclass(frozen=True)
class Prompt:
    """What a deployment is asked: token ids, and how long its answer may be, which is compared too."""

    token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Served:
    """A sequence as the deployment computed it.

    Attributes:
        token_ids: Prompt and answer.
        top: For every position but the first, log-probabilities by token id: the `TOP` most likely tokens
            and the token actually at that position.
        prompt: Length of the prompt in it.
    """

    token_ids: list[int]
    top: list[dict[int, float]]
    prompt: int


Answers = tuple[list[Served], str, Drafts | None]  # of a deployment, with its dtype and its drafts


def as_json(answers: Answers) -> dict[str, Any]:
    """`answers` as JSON can hold them."""
    served, dtype, drafts = answers
    return {"dtype": dtype, "drafts": drafts and asdict(drafts), "served": [asdict(sequence) for sequence in served]}


def from_json(kept: dict[str, Any]) -> Answers:
    """What `as_json` made, back from JSON."""
    served = [
        Served(
            sequence["token_ids"],
            [{int(token): value for token, value in row.items()} for row in sequence["top"]],
            sequence["prompt"],
        )
        for sequence in kept["served"]
    ]
    return served, kept["dtype"], kept["drafts"] and Drafts(**kept["drafts"])


def prompts_of(
    folder: Path, texts: list[str], max_tokens: int, words: int, vocab_size: int, seed: int = 0
) -> list[Prompt]:
    """User messages in the checkpoint's chat template, where it has one, and words of the vocabulary in no order.

    Texts of people use few of the words and favor some experts; words in no order reach rows of the embedding and of
    the head, and experts, that no text does. Each comes twice: what is wrong with it is wrong both times, and what
    rounding does to a place is not.

    Args:
        max_tokens: Length of the answers to the messages.
        words: How many; those of a vocabulary that has fewer come again, in another order.
        vocab_size: Rows of the embedding, which may be more than the tokenizer has words.
        seed: Of their choice.

    Raises:
        ValueError: If the checkpoint has no tokenizer that can be read, or its template refuses a message.
    """
    tokenizer = read_tokenizer(folder, "fetch tokenizer.json and tokenizer_config.json again")
    if tokenizer.chat_template:
        texts = [templated(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    prompts = [Prompt(tokenizer.encode(text, add_special_tokens=False), max_tokens) for text in texts]
    known = range(min(len(tokenizer), vocab_size))
    order = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < words:
        drawn += order.sample(known, min(words - len(drawn), len(known)))
    drawn += order.sample(drawn, len(drawn))
    return prompts + [Prompt(drawn[start : start + _RUN], 1) for start in range(0, len(drawn), _RUN)]


def ask_server(url: str, model: str | None, prompts: list[Prompt]) -> Iterator[Served]:
    """What a running vLLM server computes for each of `prompts`, and for its greedy answer to it.

    Raises:
        VerifyError: If there is no server, or it gives no log-probabilities.
    """
    from openai import BadRequestError, NotFoundError, OpenAIError

    client = connect(url, max_retries=1)
    try:
        name = model or first_model(client)
        for prompt in prompts:
            answer = client.completions.create(
                model=name,
                prompt=prompt.token_ids,
                max_tokens=prompt.max_tokens,
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
            yield Served(prompt.token_ids + answer_ids, top, len(prompt.token_ids))
    except NotFoundError as error:
        if model is None or model in (names := model_names(client)) or not names:
            raise VerifyError(no_answer(url, error)) from None
        raise VerifyError(f"--served-model-name {model}: {url} has {first_of(names)}; name one of them") from None
    except BadRequestError as error:
        longest = max(prompt.max_tokens for prompt in prompts)
        todo = f"ask for less than --max-tokens {longest}, or for shorter --prompts"
        raise VerifyError(f"{no_answer(url, error)}; {todo}") from None
    except (OpenAIError, ChatError) as error:
        raise VerifyError(no_answer(url, error)) from None
    # The library believes what it is sent: a web page, or JSON of another kind, ends somewhere in it or here.
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise VerifyError(no_answer(url, error)) from None


def ask_for(url: str, model: str | None, sequence: Served) -> Served:
    """What a server computes for the very sequence of an earlier run, whatever it answers now."""
    (now,) = ask_server(url, model, [Prompt(sequence.token_ids, 1)])
    return Served(sequence.token_ids, now.top[: len(sequence.token_ids) - 1], sequence.prompt)


def draft_counts(url: str) -> Drafts | None:
    """Drafts of a server since its start, those of others' requests too; None if it shows none."""
    import httpx

    try:
        with http_client(url, 30) as client:
            counted = samples(client.get("/metrics").raise_for_status().text)
        made, accepted = counters(counted)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    requests, unlike = total(counted, "request_success"), unlike_mtp(draft_source(counted))
    return Drafts(made, accepted, requests, unlike) if accepted else None


def vllm_version(url: str) -> str | None:
    """The release of vLLM that a server says it is; None if it says nothing."""
    import httpx

    try:
        with http_client(url, 30) as client:
            said = client.get("/version").raise_for_status().json()["version"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None


@dataclass
class AskTask(Task):
    """`ask_offline` in a process of its own."""

    prompts: list[dict[str, Any]]

    def work(self) -> dict[str, Any]:
        return as_json(ask_offline(self.model, self.engine, [Prompt(**prompt) for prompt in self.prompts]))

    def read(self, stored: Any) -> Answers:
        return from_json(stored)


def ask_engine_apart(folder: str, options: dict[str, Any], prompts: list[Prompt]) -> Answers:
    """As `ask_offline`, in a process of its own, of which nothing is left when this returns.

    Raises:
        VerifyError: If the engine did not start or did not answer.
    """
    try:
        return run_task(AskTask(folder, options, [asdict(prompt) for prompt in prompts]))
    except BenchError as error:
        raise VerifyError(f"vLLM did not answer: {error}") from None


def ask_offline(folder: str, options: dict[str, Any], prompts: list[Prompt]) -> Answers:
    """What `vllm.LLM(folder, **options)` computes in this process, as `ask_server`, its dtype, and its drafts."""
    llm = engine(folder, options)
    served = ask_engine(llm, prompts)
    return served, dtype_name(llm.llm_engine.model_config.dtype), draft_counts_of(llm)


def draft_counts_of(llm: LLM) -> Drafts | None:
    """Drafts of an engine since its start; None if it makes none."""
    import prometheus_client

    metrics: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    accepted = metrics[ACCEPTED].values if ACCEPTED in metrics else []
    unlike = unlike_mtp(draft_source(samples(prometheus_client.generate_latest().decode())))
    return Drafts(metrics[DRAFTS].value, list(accepted), unlike=unlike) if accepted else None


def engine(folder: str, options: dict[str, Any]) -> LLM:
    """`vllm.LLM(folder, **options)`, which `ask_engine` can ask."""
    from vllm import LLM

    return LLM(folder, **{"max_logprobs": TOP, "skip_tokenizer_init": True, "disable_log_stats": False, **options})


def ask_engine(llm: LLM, prompts: list[Prompt]) -> list[Served]:
    """What `engine` computes, as `ask_server`."""
    from vllm import SamplingParams

    common: dict[str, Any] = {"temperature": 0, "logprobs": TOP, "prompt_logprobs": TOP, "detokenize": False}
    params = [SamplingParams(max_tokens=prompt.max_tokens, **common) for prompt in prompts]
    outputs = llm.generate([{"prompt_token_ids": prompt.token_ids} for prompt in prompts], params, use_tqdm=False)
    served = []
    for prompt, output in zip(prompts, outputs, strict=True):
        answer: Any = output.outputs[0]
        rows: Any = [*(output.prompt_logprobs or [])[1:], *(answer.logprobs or [])]
        top = [{token: entry.logprob for token, entry in row.items()} for row in rows]
        served.append(Served(prompt.token_ids + list(answer.token_ids), top, len(prompt.token_ids)))
    return served
