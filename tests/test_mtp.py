"""Speculative decoding with the MTP layer, through the real engine.

What it must not do is change an answer: greedy tokens are compared with those of the same engine without speculation,
sampled ones with their distribution. What it must do is propose what the plain reference's MTP layer proposes.
"""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import PROMPT, make_checkpoint, read_tensors, write_tensors
from engine import TWO_RANKS, EngineError, ask, make_llm, run
from reference_cases import load_case
from scipy.stats import chi2_contingency
from test_engine_reference import TOLERANCE

from vllm_bailing.cli import DEMO
from vllm_bailing.reference import BailingMoeV2ForCausalLM

pytestmark = pytest.mark.engine
HELDOUT = Path(__file__).parent / "data" / "demo_heldout.jsonl"
# `collective_rpc` with a function needs it.
RPC = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def mtp(tokens, **options):
    return {"method": "mtp", "num_speculative_tokens": tokens, **options} if tokens else None


# --- the draft's arithmetic ---------------------------------------------------------------------------------------


def _record_draft(worker):
    """Keep what the draft model computes in its first pass over a prompt."""
    draft = worker.model_runner.drafter.model
    forward = draft.forward

    def recording(*args, **kwargs):
        output = forward(*args, **kwargs)
        if not hasattr(draft, "recorded") and len(output) >= draft.recorded_tokens:
            draft.recorded = draft.compute_logits(output[: draft.recorded_tokens]).float().cpu()
        return output

    draft.forward = recording


def _expect_tokens(worker, tokens):
    worker.model_runner.drafter.model.recorded_tokens = tokens


def _recorded(worker):
    return worker.model_runner.drafter.model.recorded


def draft_logits(model, prompt, **options):
    """Logits [T - 1, vocab] of the draft at every position whose next token is in the prompt."""
    llm = make_llm(model, speculative_config=mtp(1), **options)
    llm.collective_rpc(_expect_tokens, args=(len(prompt) - 1,))
    llm.collective_rpc(_record_draft)
    ask(llm, [prompt], max_tokens=2, logprobs=False)
    return llm.collective_rpc(_recorded)[0]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", ["mtp", "mtp_yarn"])
def test_the_draft_computes_what_the_official_code_computes(case, tp_size):
    model, expected = load_case(case)
    env = {**RPC, **(TWO_RANKS if tp_size == 2 else {})}
    logits = run(draft_logits, model, expected["input_ids"].tolist(), env=env, tensor_parallel_size=tp_size)
    wanted = expected["mtp_logits"][: len(logits)].log_softmax(-1)
    assert len(logits) == len(expected["input_ids"]) - 1
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"norm_head": True},
        {"first_k_dense_replace": 0, "num_shared_experts": 0, "use_qk_norm": False},
        {"use_bias": True, "use_qkv_bias": True, "n_group": None, "topk_group": None},
        {"first_k_dense_replace": 3},  # only the MTP layer has experts
    ],
    ids=["tied", "norm_head", "no_shared_expert", "biases", "dense_target"],
)
def test_the_draft_computes_what_the_plain_reference_computes(overrides, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1, **overrides)
    reference = BailingMoeV2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states[-1]
        wanted = reference.mtp_logits(hidden[:, :-1], ids[:, 1:])[0].log_softmax(-1)
    logits = run(draft_logits, model, PROMPT, env=RPC)
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE


# --- answers stay what they are -----------------------------------------------------------------------------------


def demo_requests(count=None):
    """Conversations about everything that the demo model knows, as arguments of `LLM.chat`."""
    rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    rows = rows if count is None else rows[:: max(1, len(rows) // count)][:count]
    return [(row["messages"], row.get("tools"), row.get("thinking", False)) for row in rows]


def _prompts(llm, requests):
    tokenizer = llm.get_tokenizer()
    return [
        tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        for messages, tools, thinking in requests
    ]


def counters(llm):
    """Speculative counters by short name, such as `accepted_tokens`."""
    prefix = "vllm:spec_decode_num_"
    return {
        m.name.removeprefix(prefix): m.value
        for m in llm.get_metrics()
        if m.name.startswith(prefix) and hasattr(m, "value")
    }


def answers(model, count, tokens, max_tokens=48, **options):
    """(token ids of the answers, speculative counters) of `count` demo conversations in one batch."""
    from vllm import SamplingParams

    options = {"max_model_len": 1024, "disable_log_stats": False, **options}
    llm = make_llm(model, speculative_config=tokens if isinstance(tokens, dict) else mtp(tokens), **options)
    prompts = [{"prompt_token_ids": ids} for ids in _prompts(llm, demo_requests(count))]
    # Chunked prefill and prefix caching reuse prompts: ask for all twice.
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = llm.generate(prompts, params, use_tqdm=False) + llm.generate(prompts[:4], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], counters(llm)


@pytest.fixture(scope="module")
def plain_answers():
    return run(answers, DEMO, 200, 0)[0]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_greedy_answers_to_200_prompts_stay_the_same(tokens, plain_answers):
    ids, counted = run(answers, DEMO, 200, tokens)
    assert ids == plain_answers
    assert counted["draft_tokens"] == tokens * counted["drafts"]
    # The demo's MTP layer was trained for the first position; the others run the same layer again.
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ({"max_num_batched_tokens": 64, "max_num_seqs": 8}, {}),
        ({"enable_prefix_caching": False}, {}),
        ({"num_gpu_blocks_override": 12, "block_size": 32, "max_model_len": 256}, {}),
        ({"async_scheduling": True}, {}),
        ({"async_scheduling": False}, {}),
        ({"enforce_eager": False}, {}),
        ({"tensor_parallel_size": 2}, TWO_RANKS),
        ({"tensor_parallel_size": 2, "enforce_eager": False}, TWO_RANKS),
    ],
    ids=["chunked", "no_prefix_cache", "preemption", "async", "sync", "compiled", "tp2", "tp2_compiled"],
)
def test_greedy_answers_stay_the_same_with(options, env, plain_answers):
    count = 25 if "num_gpu_blocks_override" not in options else 8
    wanted = plain_answers[: 200 : 200 // count]
    ids, counted = run(answers, DEMO, count, 2, env=env, **options)
    assert ids[:count] == wanted
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


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
    ids = _prompts(llm, [([{"role": "user", "content": prompt}], None, False) for prompt in prompts])
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
    "bias": ("Hello!", {"logit_bias": {100: 5.0}}),
    "bad words": ("Hello!", {"bad_words": ["demo"]}),
    "min tokens": ("What is 3+4?", {"min_tokens": 20}),
    "one token": ("What is 3+4?", {"max_tokens": 1}),
    "two tokens": ("What is 3+4?", {"max_tokens": 2}),
    "seed": ("Tell me about vLLM.", {"temperature": 0.0, "seed": 3}),
}


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_batch_of_every_sampling_parameter_stays_the_same(tokens):
    prompts, params = zip(*MIXED.values(), strict=True)
    wanted, _ = run(sampled, DEMO, 0, prompts, params)
    rows, counted = run(sampled, DEMO, tokens, prompts, params)
    assert counted["accepted_tokens"] > 0
    for name, row, expected in zip(MIXED, rows, wanted, strict=True):
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
    wanted, _ = run(first_tokens, model, 0, prompt, 4000)
    for tokens in (1, 3):
        drawn, counted = run(first_tokens, model, tokens, prompt, 4000)
        assert 0.01 < counted["accepted_tokens"] / counted["draft_tokens"] < 0.99
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
    prompts = [{"prompt_token_ids": ids} for ids in _prompts(llm, demo_requests(6))]
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
    assert run(aborted, DEMO, 2) == run(aborted, DEMO, 0)


# --- where the draft comes from -----------------------------------------------------------------------------------


def split_mtp(folder, tmp_path, count=1):
    """The target without its MTP layer, and the MTP layer alone."""
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    prefix = f"model.layers.{config['num_hidden_layers']}."
    for name, wanted in (("target", False), ("draft", True)):
        part = tmp_path / name
        part.mkdir()
        write_tensors(part, {key: value for key, value in tensors.items() if key.startswith(prefix) == wanted})
        (part / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": count if wanted else 0}))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (part / file).write_bytes((DEMO / file).read_bytes())
    return tmp_path / "target", tmp_path / "draft"


@pytest.mark.parametrize("whole", [False, True], ids=["layer_alone", "base_model"])
def test_the_draft_may_be_a_checkpoint_of_its_own(whole, tmp_path, plain_answers):
    target, draft = split_mtp(DEMO, tmp_path)
    draft = DEMO if whole else draft
    ids, counted = run(answers, target, 25, mtp(2, model=str(draft)))
    assert ids[:25] == plain_answers[:200:8]
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


def test_overrides_of_the_target_reach_its_draft(tmp_path):
    """YaRN by --hf-overrides: past the draft's original length it would propose nothing of use, without a word."""
    model, expected = load_case("mtp_yarn")
    raw = json.loads((model / "config.json").read_text())
    plain = tmp_path / "model"
    plain.mkdir()
    scaling = raw.pop("rope_scaling")
    (plain / "config.json").write_text(json.dumps({**raw, "num_nextn_predict_layers": 0}))
    (plain / "model.safetensors").symlink_to(model / "model.safetensors")
    overrides = {"rope_scaling": scaling, "num_nextn_predict_layers": 1}
    prompt = expected["input_ids"].tolist()
    logits = run(draft_logits, plain, prompt, env=RPC, hf_overrides=overrides)
    wanted = expected["mtp_logits"][: len(logits)].log_softmax(-1)
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE


def no_layer_in_config(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))


def no_layer_in_files(model):
    write_tensors(model, {name: tensor for name, tensor in read_tensors(model).items() if ".layers.3." not in name})


def no_layer_at_all(model):
    no_layer_in_config(model)
    no_layer_in_files(model)


def no_projection(model):
    tensors = read_tensors(model)
    del tensors["model.layers.3.eh_proj.weight"]
    write_tensors(model, tensors)


def cut_off(model):
    write_tensors(model, read_tensors(model), shards=3)
    file = model / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (no_layer_in_config, ["num_nextn_predict_layers=0", "holds 1 MTP layer(s), number 3", "pass --hf-overrides"]),
        (no_layer_in_files, ["has no MTP layer, though num_nextn_predict_layers=1", '"model": "..."']),
        (no_layer_at_all, ["has no MTP layer (num_nextn_predict_layers=0)", '"model": "..."']),
        (no_projection, ["1 missing (model.layers.3.eh_proj.weight)"]),
        (cut_off, ["model-00003-of-00003.safetensors is cut off or damaged"]),
    ],
)
def test_a_checkpoint_without_a_usable_mtp_layer_is_refused(damage, fragments, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    damage(model)
    with pytest.raises(EngineError) as refusal:
        run(make_llm, model, speculative_config=mtp(1))
    assert refusal.value.message.startswith("CheckpointError: ")
    assert "\n" not in refusal.value.message
    for fragment in fragments:
        assert fragment in refusal.value.message


def test_a_draft_of_another_model_is_refused(tmp_path):
    model = make_checkpoint(tmp_path / "a")
    draft = make_checkpoint(tmp_path / "b", num_nextn_predict_layers=1, vocab_size=128)
    with pytest.raises(EngineError, match="has vocab_size=128, the target 256"):
        run(make_llm, model, speculative_config=mtp(1, model=str(draft)))
