"""Sampled answers with MTP drafts: parameters, distribution, requests that are aborted."""

import functools

import pytest
from packaging.version import Version
from scipy.stats import chi2_contingency

from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors, write_tensors
from tests.support.engine import TOLERANCE, make_llm, run_in_turn
from tests.support.speculation import counters, demo_requests, mtp, prompts_of
from tests.support.versions import INSTALLED
from vllm_bailing import DEMO


def sampled(model, tokens, prompts, params, **options):
    """For each request what came out of sampling parameters `params`: ids, text and the logprobs of the ids."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = make_llm(model, speculative_config=mtp(tokens), max_model_len=1024, disable_log_stats=False, **options)
    structure = [
        {**one, "structured_outputs": StructuredOutputsParams(**one["structured_outputs"])}
        if "structured_outputs" in one
        else one
        for one in params
    ]
    ids = prompts_of(llm, [([{"role": "user", "content": prompt}], None, False) for prompt in prompts])
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in ids],
        [SamplingParams(**{"temperature": 0, "max_tokens": 40, **one}) for one in structure],
        use_tqdm=False,
    )
    rows = []
    for output in outputs:
        answer = output.outputs[0]
        logprobs = [{id: entry.logprob for id, entry in row.items()} for row in answer.logprobs or []]
        rows.append((list(answer.token_ids), answer.text, answer.finish_reason, answer.stop_reason, logprobs))
    return rows, counters(llm)


MIXED = {  # name -> (prompt, sampling parameters)
    "logprobs": ("What is YaRN?", {"logprobs": 5}),
    "penalties": ("What is YaRN?", {"repetition_penalty": 1.05, "frequency_penalty": 0.5, "presence_penalty": 0.3}),
    "strong penalties": ("Tell me about vLLM.", {"repetition_penalty": 1.5}),
    "stop string": ("What is MTP?", {"stop": ["extra layer"]}),
    "stop token in a draft": ("What is MTP?", {"stop": ["."], "include_stop_str_in_output": True}),
    "choice": ("What is the capital of France?", {"structured_outputs": {"choice": ["Rome", "Madrid"]}}),
    "regex": ("What is 3+4?", {"structured_outputs": {"regex": "[a-z]{2,5} [0-9]{3}"}}),
    "json": (
        "Tell me about Ring.",
        {
            "structured_outputs": {
                "json": {
                    "type": "object",
                    "properties": {"sum": {"type": "integer"}},
                    "required": ["sum"],
                    "additionalProperties": False,
                }
            }
        },
    ),
    "bad words": ("Hello!", {"bad_words": ["demo"]}),
    "min tokens": ("What is 3+4?", {"min_tokens": 20}),
    "one token": ("What is 3+4?", {"max_tokens": 1}),
    "two tokens": ("What is 3+4?", {"max_tokens": 2}),
    "seed": ("Tell me about vLLM.", {"temperature": 0.0, "seed": 3}),
}


def cuts_ids_at_a_stop_string():
    """Older vLLM cuts only the text there and returns the ids of all drafts accepted behind it, of any method."""
    return Version("0.32") <= INSTALLED


@functools.cache
def without_drafts():
    return run_in_turn(sampled, DEMO, 0, *zip(*MIXED.values(), strict=True))[0]


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_batch_of_every_sampling_parameter_stays_the_same(tokens):
    prompts, params = zip(*MIXED.values(), strict=True)
    wanted = without_drafts()
    rows, counted = run_in_turn(sampled, DEMO, tokens, prompts, params)
    assert counted["accepted_tokens"] > 0
    for name, row, expected in zip(MIXED, rows, wanted, strict=True):
        if "stop" in MIXED[name][1] and not cuts_ids_at_a_stop_string():
            row[0][len(expected[0]) :] = []
        assert row[:4] == expected[:4], name
        assert len(row[4]) == len(expected[4])
        for mine, theirs in zip(row[4], expected[4], strict=True):
            assert mine == pytest.approx(theirs, abs=TOLERANCE)


def first_tokens(model, tokens, prompt, samples):
    """The first three tokens of `samples` answers at temperature 1."""
    from vllm import SamplingParams

    llm = make_llm(model, speculative_config=mtp(tokens), disable_log_stats=False, max_num_seqs=256)
    params = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt}] * samples, params, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids[:3]) for output in outputs], counters(llm)


def p_value(one, other):
    """Of the hypothesis that two samples come from one distribution; values seen fewer than ten times are pooled."""
    seen = {}
    for column, sample in enumerate((one, other)):
        for value in sample:
            seen.setdefault(value, [0, 0])[column] += 1
    common = [counts for counts in seen.values() if sum(counts) >= 10]
    rest = [sum(counts[i] for counts in seen.values() if sum(counts) < 10) for i in (0, 1)]
    table = [counts for counts in [*common, rest] if sum(counts)]
    return 1.0 if len(table) < 2 else chi2_contingency(table).pvalue


def test_sampled_tokens_keep_their_distribution(tmp_path):
    """At temperature 1, over 4,000 answers; one in a thousand correct runs would fail."""
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1, vocab_size=32)
    tensors = read_tensors(model)
    tensors["lm_head.weight"] *= 0.25  # flat enough for every token to appear, steep enough for a wrong one to show
    write_tensors(model, tensors)
    prompt = [token % 32 for token in PROMPT]
    wanted, _ = run_in_turn(first_tokens, model, 0, prompt, 4000)
    for tokens in (1, 3):
        drawn, counted = run_in_turn(first_tokens, model, tokens, prompt, 4000)
        # Both happened: nothing is proved by drafts that were all accepted, or all thrown away.
        assert 0.01 * counted["drafts"] < counted["accepted_tokens"] < 0.99 * counted["draft_tokens"]
        for position in range(3):
            column = [row[position] for row in drawn]
            assert p_value(column, [row[position] for row in wanted]) > 1e-4
        pairs = [row[:2] for row in drawn]
        assert p_value(pairs, [row[:2] for row in wanted]) > 1e-4


def aborted(model, tokens):
    """Ids of an answer that other requests, aborted half-way, shared the batch with."""
    from vllm import SamplingParams

    llm = make_llm(model, speculative_config=mtp(tokens), max_model_len=1024)
    engine, found = llm.llm_engine, {}
    prompts = [{"prompt_token_ids": ids} for ids in prompts_of(llm, demo_requests(6))]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=40))
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 3:
            engine.abort_request(["1", "4"])
    return {number: found.get(number) for number in ("0", "2", "3", "5")}


def test_aborting_requests_leaves_the_others_alone():
    assert run_in_turn(aborted, DEMO, 2) == run_in_turn(aborted, DEMO, 0)
