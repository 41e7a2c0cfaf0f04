"""`vllm-bailing verify`: the reference that is read layer by layer, and its verdict."""

from __future__ import annotations

import math

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI

from tests.support.cases import CASES, load_case
from tests.support.checkpoints import (
    changed_demo,
    make_checkpoint,
    plain_answer,
)
from tests.support.commands import invoke
from tests.support.pages import serving_page
from tests.support.quantized import plain_copy, quantize
from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.errors import CheckpointError, VerifyError
from vllm_bailing.reference import BailingMoeV2ForCausalLM
from vllm_bailing.tools import verify, verify_deployment, verify_verdict
from vllm_bailing.tools.verify import Served
from vllm_bailing.tools.verify_deployment import vllm_version
from vllm_bailing.tools.verify_drafts import Drafts
from vllm_bailing.tools.verify_reference import Asked, Reference, Rounding, TensorReader

FP32 = Rounding("float32")


def streamed(folder, sequences, work, config=None, copies=0, rounding=FP32, progress=lambda done: None):
    """The reference over `sequences`, asked for every token's log-probability, and what it gives."""
    config = config or read_config(folder)
    positions = sum(len(ids) - 1 for ids in sequences)
    asked = Asked.of(sequences, [list(range(config.vocab_size))] * positions)
    found = Reference(folder, config, asked, work, rounding, progress)
    return found, found.forward(copies)


def by_position(values, vocab):
    return torch.from_numpy(values).float().view(-1, vocab)


# ---- the streamed reference against the whole model --------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_reading_layer_by_layer_gives_what_the_whole_model_gives(case, tmp_path):
    folder, _ = load_case(case)
    config = read_config(folder)
    sequences = [[(5 * i * i + i) % config.vocab_size for i in range(length)] for length in (7, 24, 15)]
    _, computed = streamed(folder, sequences, tmp_path / "work")
    came, best = by_position(computed.logprobs, config.vocab_size), computed.likeliest.tolist()
    model = BailingMoeV2ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    place = 0
    for ids in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        here = slice(place, place + len(logits))
        # fp32, other orders of summation, which the number of threads decides: 9e-7 of the largest logit was seen.
        bound = 1.5e-6 * float(logits.abs().max())
        torch.testing.assert_close(came[here], logits.log_softmax(-1), atol=bound, rtol=0)
        assert best[here] == logits.argmax(-1).tolist()
        place += len(logits)


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "gptq", "awq"])
def test_a_quantized_checkpoint_is_read_as_what_it_stands_for(scheme, tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    meaning = quantize(folder, scheme)
    config = read_config(folder)
    prompt = list(range(20, 60))
    wanted, _ = plain_answer(plain_copy(folder, meaning, tmp_path / "plain"), prompt, max_tokens=1)
    came = by_position(streamed(folder, [prompt], tmp_path / "work")[1].logprobs, config.vocab_size)
    torch.testing.assert_close(came, wanted[: len(came)], atol=1e-4, rtol=0)


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path):
    folder, _ = load_case("plain")
    work, sequences = tmp_path / "work", [list(range(12)), list(range(5, 14))]
    arguments = {"copies": 2, "rounding": Rounding("bfloat16")}
    _, whole = streamed(folder, sequences, tmp_path / "other", **arguments)

    def cut(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(folder, sequences, work, progress=cut, **arguments)
    seen = []
    _, again = streamed(folder, sequences, work, progress=seen.append, **arguments)
    assert seen[0] == 2
    for field in ("logprobs", "copies", "cut", "likeliest", "experts"):
        assert np.array_equal(getattr(again, field), getattr(whole, field)), field
    served = [Served([1, 2], [{2: -0.5, 3: -1.5}], 1)]
    verify.keep_served(work, (served, "fp8", Drafts(5, [3])))
    assert verify.served_before(work) == (served, "fp8", Drafts(5, [3]))
    verify.delete_work(work)
    assert verify.served_before(work) is None


PAGES = {
    "a web page": "<html>It works!</html>",
    "a list": "[]",
    "a number": "3",
    "no models": '{"object": "list", "data": []}',
    "models of another kind": '{"data": ["demo"]}',
    "no answers": '{"data": [{"id": "demo"}], "choices": []}',
    "answers of another kind": '{"data": [{"id": "demo"}], "choices": [{"text": "hi", "logprobs": {"tokens": [1]}}]}',
}


@pytest.mark.parametrize("page", PAGES)
def test_what_is_no_server_of_vllm_is_one_line(page, tmp_path):
    with serving_page(PAGES[page]) as address:
        url = f"http://{address}"
        done = invoke("verify", DEMO, "--url", url, XDG_CACHE_HOME=str(tmp_path))
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and url in done.stderr, (done.output, done.exception)


@pytest.mark.parametrize(
    ("status", "message", "model", "said"),
    [
        (404, "no such model", "foo", "--served-model-name foo: http://here has demo; name one of them"),
        (
            400,
            "at most 2048 tokens",
            None,
            "http://here refuses a request (HTTP 400): at most 2048 tokens; ask for less than --max-",
        ),
        (401, "Unauthorized", None, "http://here asks for a key (HTTP 401); set VLLM_API_KEY to it"),
        (503, "", None, "http://here is not ready (HTTP 503); wait until it has loaded its model"),
    ],
)
def test_what_a_server_refuses_is_told_by_the_option(status, message, model, said, monkeypatch):
    def answer(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo", "object": "model"}]})
        return httpx.Response(status, json={"error": {"message": message}})

    def connect(url, **_):
        client = httpx.Client(transport=httpx.MockTransport(answer))
        return OpenAI(base_url=f"{url}/v1", api_key="none", http_client=client, max_retries=0)

    monkeypatch.setattr(verify_deployment, "connect", connect)
    with pytest.raises(VerifyError) as refusal:
        next(verify_deployment.ask_server("http://here", model, [verify_deployment.Prompt([1], 32)]))
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize(
    ("vllm", "is_fused"),
    [
        *[("0.27.1", True), ("0.29.0+cpu", True), ("0.30.0", False), ("0.32.0", False), ("1.0", False)],
        *[(None, False), ("0.1.dev5+gabc", False), ("dev", False), ("", False)],
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_the_release_tells_how_experts_are_rounded(vllm, is_fused, dtype):
    assert Rounding.of(read_config(DEMO), dtype, vllm).fused_experts == is_fused


INT4 = {"quant_method": "gptq", "bits": 4, "group_size": 128}
INT8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"a": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"type": "int"}}},
}
MIXED = {**INT8, "config_groups": {**INT8["config_groups"], "b": {"weights": {"num_bits": 4, "type": "int"}}}}


@pytest.mark.parametrize(
    ("quantization", "inputs", "fused"),
    [
        (None, [None], [False]),
        (INT8, ["int8", None], [False, True]),
        (INT4, [None, "int8 by 128", "int8"], [False, True, False]),
        (MIXED, ["int8", None, "int8 by 128"], [False, True, True]),
    ],
)
def test_kernels_for_integers_may_round_in_several_ways(quantization, inputs, fused):
    """Those of this package keep what is inside experts in fp32."""
    config = read_config(DEMO)
    config.quantization_config = quantization
    assert [one.inputs for one in Rounding.possible(config, "bfloat16")] == inputs
    assert [one.fused_experts for one in Rounding.possible(config, "bfloat16")] == fused
    config.quantization_config, config.stored_quantization_config = None, quantization  # dequantized
    assert [one.inputs for one in Rounding.possible(config, "bfloat16")] == [None]


@pytest.mark.parametrize("page", ['{"version": "0.27.1"}', '{"version": 3}', "[]", "<html>It works!</html>"])
def test_a_server_may_say_what_release_it_is(page):
    with serving_page(page) as address:
        assert vllm_version(f"http://{address}") == ("0.27.1" if "0.27.1" in page else None)


def test_damaged_weights_are_no_verdict_on_a_deployment(tmp_path):
    def damage(tensors):
        tensors["model.layers.1.attention.dense.weight"][3, 3] = math.nan

    folder = changed_demo(tmp_path / "damaged", damage)
    with pytest.raises(VerifyError) as refusal:
        streamed(folder, [[1, 2, 3]], tmp_path / "work")
    assert str(refusal.value) == (
        f"the reference gives NaN or infinity in layer 1: weights of {folder} are damaged; see `vllm-bailing doctor "
        f"{folder} --deep`"
    )


def test_a_deployment_that_gives_no_numbers_does_not_compute(tmp_path):
    served = [Served([1, 2, 3], [{2: math.nan, 3: -1.0}, {3: -0.5, 1: -2.0}], 1)] * 2
    report = verify.judged(DEMO, read_config(DEMO), served, "float32", tmp_path)
    assert report["reason"] == "2 of its 8 log-probabilities are NaN or infinite"


@pytest.mark.parametrize(("value", "seen"), [(8.715, "8.72"), (2.0849, "2.08"), (0.0, "0.00"), (math.inf, "inf")])
def test_a_limit_is_rounded_as_people_round_it(value, seen):
    assert verify_verdict.two_digits(value) == seen


# ---- the verdict -------------------------------------------------------------------------------------------


def test_deviations_are_computed_as_they_are_defined():
    served = Served([0, 1, 2], [{1: math.log(0.5), 0: math.log(0.25)}, {2: math.log(0.1), 0: math.log(0.8)}], 1)
    right = [{1: math.log(0.25), 0: math.log(0.5)}, {2: math.log(0.1), 0: math.log(0.8)}]
    found = verify.compare(served, right, [0, 0])
    assert found.tokens == 2 and found.agreement == 0.5
    assert found.max == pytest.approx(math.log(2)) and found.mean == pytest.approx(math.log(2) / 2)
    # 0.25 ln(0.25 / 0.5) + 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.25), over two positions
    assert found.divergence == pytest.approx(0.25 * math.log(2) / 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["no-such/model"],
            "neither a folder nor a model that was downloaded; fetch it by `hf download no-such/model`",
        ),
        ([DEMO, "--url", "http://127.0.0.1:9"], "no server at http://127.0.0.1:9; start one by"),
        ([DEMO, "--url", "http://no.invalid:9"], "the name in http://no.invalid:9 cannot be resolved ("),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, message, tmp_path):
    done = invoke("verify", *arguments, XDG_CACHE_HOME=str(tmp_path))
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_checkpoint_without_a_shard_is_refused(tmp_path):
    folder = changed_demo(tmp_path / "cut", lambda tensors: tensors.pop("model.layers.1.attention.dense.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.1.attention.dense.weight\)"):
        TensorReader(folder, read_config(folder))
