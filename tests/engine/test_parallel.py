"""Ways of dividing a model between ranks: the answers are those of the official code, and ranks are all alike."""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from unittest import mock

import pytest
import torch

from tests.support.adapters import adapted, make_adapter, merged
from tests.support.balancing import balanced
from tests.support.cases import CASES, load_case
from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer
from tests.support.conversations import prompt_ids, spread
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, generate, run, run_in_turn
from tests.support.quantized import DEQUANTIZE, quantized_demo
from tests.support.server import free_port
from tests.support.speculation import mtp
from tests.support.versions import SHARED_EXPERTS
from vllm_bailing import DEMO

EXPERTS_OF_CASES = 16
EXPERTS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
DIVIDED = {"additional_config": {"bailing_sequence_parallel": True}}


def check(answer, expected, length=None):
    """Compare an answer to the first `length` tokens of a case's prompt with what the official code computed."""
    logprobs, token_ids = answer
    wanted = expected["logits"].log_softmax(-1)
    length = length or len(wanted)
    assert logprobs.shape == wanted[: length - 1].shape
    assert (logprobs - wanted[: length - 1]).abs().max() <= TOLERANCE
    if length == len(wanted):
        assert token_ids == expected["greedy_ids"].tolist()


# ---- experts ---------------------------------------------------------------------------------------------------------


@SHARED_EXPERTS
@pytest.mark.parametrize("case", CASES)
def test_ranks_share_the_experts(case):
    model, expected = load_case(case)
    (answer,) = run_in_turn(generate, model, [expected["input_ids"].tolist()], env=TWO_RANKS, **EXPERTS)
    check(answer, expected)


@SHARED_EXPERTS
def test_ranks_share_the_experts_of_compiled_models():
    model, expected = load_case("plain")
    options = {**EXPERTS, "enforce_eager": False}
    (answer,) = run_in_turn(generate, model, [expected["input_ids"].tolist()], env=TWO_RANKS, **options)
    check(answer, expected)


@SHARED_EXPERTS
@pytest.mark.parametrize("scheme", ["", "w8a8"], ids=["bf16", "int8"])
def test_ranks_share_experts_in_few_bits_as_exactly_as_one_has_them(scheme, plain, tmp_path):
    model = quantized_demo(scheme, tmp_path / "demo") if scheme else DEMO
    prompts = [prompt_ids(plain, row) for row in spread(4)]
    wanted = [plain.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).detach() for ids in prompts]

    def deviation(**options):
        answers = run_in_turn(generate, model, prompts, dtype="bfloat16", **(DEQUANTIZE if scheme else {}), **options)
        return torch.cat([(table - exact).abs().flatten() for (table, _), exact in zip(answers, wanted, strict=True)])

    alone, shared = deviation(), deviation(env=TWO_RANKS, **EXPERTS)
    assert 0 < shared.mean() <= 1.5 * alone.mean()  # another order of sums, where a wrong expert is nats away
    assert shared.max() <= 2 * alone.max()


@SHARED_EXPERTS
def test_ranks_share_the_experts_of_a_draft():
    model, expected = load_case("mtp")
    options = {**EXPERTS, "speculative_config": mtp(2), "logprobs": False}
    ((_, token_ids),) = run_in_turn(generate, model, [expected["input_ids"].tolist()], env=TWO_RANKS, **options)
    assert token_ids == expected["greedy_ids"].tolist()


@SHARED_EXPERTS
def test_ranks_that_share_the_experts_take_adapters(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, ("query_key_value", "dense"))
    _, wanted_ids = plain_answer(merged(model, adapter, tmp_path / "merged"), PROMPT)
    ((_, ids),), _ = run_in_turn(adapted, model, [(PROMPT, adapter)], logprobs=False, env=TWO_RANKS, **EXPERTS)
    assert ids == wanted_ids


@SHARED_EXPERTS
@pytest.mark.parametrize("case", ["plain", "one_group", "two_shared", "mtp"])
def test_experts_move_between_ranks(case):
    model, expected = load_case(case)
    options = {"speculative_config": mtp(2)} if case == "mtp" else {}
    found = run(balanced, model, expected["input_ids"].tolist(), env=TWO_RANKS, **options)
    for when in ("before", "after"):
        if case == "mtp":
            assert found[when][1] == expected["greedy_ids"].tolist()
        else:
            check(found[when], expected)
    before, after = found["experts"]
    for number, (places, _) in enumerate(before[0]):  # of the target, and of the draft
        moved = 0
        for layer, was in enumerate(places):
            now = after[0][number][0][layer]
            held = [[mark for rank in ranks for mark in rank[number][1][layer]] for ranks in (before, after)]
            of = dict(zip(was, held[0], strict=True))
            assert [of[expert] for expert in now] == held[1]
            moved += sum(one != other for one, other in zip(was, now, strict=True))
        assert moved
        assert any(count for layer in found["counts"][0][number] for count in layer)
    slots = len(before[0][0][0][0])  # on two ranks
    for rank in found["sizes"]:
        for parts in rank:
            assert len(parts) > 1 and set(parts) == {(2 * slots, slots // 2, 2 * slots - EXPERTS_OF_CASES)}


# ---- requests --------------------------------------------------------------------------------------------------------


@dataclass
class Rank:
    """A rank of data parallelism, with a prompt of its own."""

    model: object
    prompt: list[int]
    options: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    job: object = generate


def data_parallel(ranks, cores="0|1", **options):
    """The answer of each of `ranks`, or the EngineError that it ended with."""
    port = free_port()

    def ask_rank(number):
        names = {"RANK": number, "RANK_LOCAL": number, "SIZE": len(ranks)}
        names |= {"MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
        env = {f"VLLM_DP_{name}": str(value) for name, value in names.items()}
        rank = ranks[number]
        env = {**TWO_RANKS, **env, **rank.env, "VLLM_CPU_OMP_THREADS_BIND": cores}
        try:
            return run(rank.job, rank.model, [rank.prompt], env=env, timeout=240, **{**options, **rank.options})[0]
        except EngineError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(ask_rank, range(len(ranks))))


def shared(*values):
    """A row of a table of tests whose ranks share the experts."""
    return pytest.param(*values, marks=SHARED_EXPERTS)


@pytest.mark.parametrize(
    ("case", "cores", "options"),
    [
        ("plain", "0|1", {}),
        ("mtp", "0|1", {}),
        shared("plain", "0|1", {"enable_expert_parallel": True}),
        shared("one_group", "0|1", {"enable_expert_parallel": True}),
        ("plain", "0|1", {"enforce_eager": False}),
        shared("plain", "0|1", {"enable_expert_parallel": True, "enforce_eager": False}),
        shared("plain", "0|1|0|1", EXPERTS),
        shared("two_shared", "0|1|0|1", EXPERTS),
        shared("mtp", "0|1|0|1", {**EXPERTS, **DIVIDED}),
    ],
    ids=[
        "data",
        "data, mtp",
        "experts",
        "experts, one group",
        "data, compiled",
        "experts, compiled",
        "sequences",
        "sequences, two shared",
        "sequences stay divided",
    ],
)
def test_ranks_have_requests_of_their_own(case, cores, options):
    model, expected = load_case(case)
    prompt = expected["input_ids"].tolist()
    ranks = [Rank(model, prompt), Rank(model, prompt[:-7])]  # so that each has another number of tokens
    for rank, answer in zip(ranks, data_parallel(ranks, cores, **options), strict=True):
        check(answer, expected, len(rank.prompt))


# ---- ranks that are not alike ----------------------------------------------------------------------------------------


def of_another_version(*args, **kwargs):
    from vllm_bailing.plugin import agreement

    with mock.patch.object(agreement, "__version__", "0.0.1"):
        return generate(*args, **kwargs)


def without_comparison(*args, **kwargs):
    from vllm_bailing import model

    with mock.patch.object(model, "check_ranks_agree", lambda *_: None):
        return generate(*args, **kwargs)


def impatient(*args, **kwargs):
    from vllm_bailing.plugin import agreement

    with mock.patch.object(agreement, "WAIT", timedelta(seconds=15)):
        return generate(*args, **kwargs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"options": {"hf_overrides": {"routed_scaling_factor": 2.4}}},
            "config.json routed_scaling_factor 2.5 and 2.4",
        ),
        ({"options": {"dtype": "bfloat16"}}, "--dtype 'torch.float32' and 'torch.bfloat16'"),
        ({"job": of_another_version}, "and '0.0.1'; install the same packages"),
        (
            {"env": {"VLLM_BAILING_USE_INTREE": "1"}},
            "model class 'vllm_bailing.model.BailingMoeV2ForCausalLM' and 'vllm.model_executor.models.bailing_moe.",
        ),
    ],
    ids=["settings", "dtype", "version", "class"],
)
def test_ranks_that_differ_are_all_refused(other, message):
    model, expected = load_case("plain")
    prompt = expected["input_ids"].tolist()
    for error in data_parallel([Rank(model, prompt), Rank(model, prompt, **other)]):
        assert isinstance(error, EngineError)
        assert f"rank 0 on {socket.gethostname()} and rank 1 on {socket.gethostname()} differ in" in error.log
        assert message in error.log


def test_ranks_that_all_have_the_class_of_vllm_agree():
    model, expected = load_case("plain")
    env = {**TWO_RANKS, "VLLM_BAILING_USE_INTREE": "1"}
    (answer,) = run(generate, model, [expected["input_ids"].tolist()], env=env, tensor_parallel_size=2)
    check(answer, expected)


def test_a_rank_that_compares_nothing_is_missed():
    model, expected = load_case("plain")
    prompt = expected["input_ids"].tolist()
    ours, theirs = data_parallel([Rank(model, prompt, job=impatient), Rank(model, prompt, job=without_comparison)])
    assert isinstance(theirs, EngineError)
    assert "not all of the 2 ranks have vllm-bailing" in ours.log
    assert "Rank 1 failed to pass" in ours.log
