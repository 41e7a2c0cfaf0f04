"""Speculative decoding with the MTP layer, an EAGLE-3 draft or n-grams, through the real engine.

What it must not do is change an answer: greedy tokens are compared with those of the same engine without speculation,
sampled ones with their distribution. What it must do is propose what the plain reference's MTP layer proposes.
"""

import json
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from checkpoints import PROMPT, make_checkpoint, no_expert, quantize, read_tensors, write_tensors
from engine import TWO_RANKS, TWO_SPAWNED_RANKS, EngineError, ask, make_llm, run
from packaging.version import Version
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
        hidden = output[0] if isinstance(output, tuple) else output  # EAGLE-3 also returns what feeds its next step
        if not hasattr(draft, "recorded") and len(hidden) >= draft.recorded_tokens:
            draft.recorded = draft.compute_logits(hidden[: draft.recorded_tokens]).float().cpu()
        return output

    draft.forward = recording


def _expect_tokens(worker, tokens):
    worker.model_runner.drafter.model.recorded_tokens = tokens


def _recorded(worker):
    return worker.model_runner.drafter.model.recorded


def draft_logits(model, prompt, speculative_config=None, **options):
    """Logits [T - 1, vocab] of the draft at every position whose next token is in the prompt."""
    llm = make_llm(model, speculative_config=speculative_config or mtp(1), **options)
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


def spread(rows, count):
    """`count` of `rows`, evenly from all of them."""
    return [rows[i * len(rows) // count] for i in range(count)]


def demo_requests(count):
    """Conversations about everything that the demo model knows: messages, tools, whether it thinks."""
    rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    rows = spread(spread(rows, 200), count)
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
    """vLLM's counters by short name, such as `accepted_tokens` and `preemptions`."""
    return {
        metric.name.removeprefix("vllm:").removeprefix("spec_decode_").removeprefix("num_"): metric.value
        for metric in llm.get_metrics()
        if hasattr(metric, "value")
    }


def answers(model, count, tokens, max_tokens=48, **options):
    """(token ids of the answers, speculative counters) of `count` demo conversations in one batch."""
    from vllm import SamplingParams

    options = {"max_model_len": 1024, "disable_log_stats": False, **options}
    llm = make_llm(model, speculative_config=tokens if isinstance(tokens, dict) else mtp(tokens), **options)
    prompts = [{"prompt_token_ids": ids} for ids in _prompts(llm, demo_requests(count))]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    # Prompts that are cached by now, of which the draft has to find its own keys and values too.
    again = llm.generate(prompts[:4], params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in again] == ids[:4]
    return ids, counters(llm)


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
        ({"num_gpu_blocks_override": 20, "block_size": 32, "max_model_len": 512}, {}),
        ({"async_scheduling": True}, {}),
        ({"async_scheduling": False}, {}),
        ({"enforce_eager": False}, {}),
        ({"tensor_parallel_size": 2}, TWO_RANKS),
        ({"tensor_parallel_size": 2, "enforce_eager": False}, TWO_SPAWNED_RANKS),
    ],
    ids=["chunked", "no_prefix_cache", "preemption", "async", "sync", "compiled", "tp2", "tp2_compiled"],
)
def test_greedy_answers_stay_the_same_with(options, env, plain_answers):
    ids, counted = run(answers, DEMO, 25, 2, env=env, **options)
    assert ids == spread(plain_answers, 25)
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]
    assert (counted["preemptions"] > 0) == ("num_gpu_blocks_override" in options)


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
    "bad words": ("Hello!", {"bad_words": ["demo"]}),
    "min tokens": ("What is 3+4?", {"min_tokens": 20}),
    "one token": ("What is 3+4?", {"max_tokens": 1}),
    "two tokens": ("What is 3+4?", {"max_tokens": 2}),
    "seed": ("Tell me about vLLM.", {"temperature": 0.0, "seed": 3}),
}


def cuts_ids_at_a_stop_string():
    """Older vLLM cuts only the text there and returns the ids of all drafts accepted behind it, of any method."""
    return Version(version("vllm")) >= Version("0.32")


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_batch_of_every_sampling_parameter_stays_the_same(tokens):
    prompts, params = zip(*MIXED.values(), strict=True)
    wanted, _ = run(sampled, DEMO, 0, prompts, params)
    rows, counted = run(sampled, DEMO, tokens, prompts, params)
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
    wanted, _ = run(first_tokens, model, 0, prompt, 4000)
    for tokens in (1, 3):
        drawn, counted = run(first_tokens, model, tokens, prompt, 4000)
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


def continued(model, tokens, prompts):
    """Greedy continuations of `prompts`, and the counters."""
    llm = make_llm(model, speculative_config=mtp(tokens), disable_log_stats=False)
    return [ids for _, ids in ask(llm, prompts, max_tokens=24, logprobs=False)], counters(llm)


@pytest.mark.parametrize("layers", [1, 2])
def test_random_weights_with_more_draft_tokens_than_layers_change_no_answer(layers, tmp_path):
    """Nearly every draft is thrown away here, in contrast to the demo."""
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=layers, shards=4)  # each has a part of the MTP layers
    prompts = [PROMPT[start : start + 8 + 3 * start] for start in range(12)]
    wanted, _ = run(continued, model, 0, prompts)
    ids, counted = run(continued, model, 3, prompts)
    assert ids == wanted
    assert counted["accepted_tokens"] < 0.5 * counted["drafts"]


@pytest.mark.parametrize("case", ["mtp", "mtp_yarn"])
def test_greedy_answers_to_the_recorded_prompts_stay_the_same(case):
    model, expected = load_case(case)
    for tokens in (1, 2, 3):
        ids, counted = run(continued, model, tokens, [expected["input_ids"].tolist()])
        assert ids[0][:16] == expected["greedy_ids"].tolist()
        assert counted["draft_tokens"] > 0


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
    assert ids == spread(plain_answers, 25)
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


def test_a_quantised_target_has_a_quantised_draft(tmp_path):
    """Everything that vLLM's CPU build can quantise is int8; `eh_proj` has no scale and stays as it is."""
    model = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    quantize(model, "w8a8", no_expert)
    wanted, _ = run(answers, model, 25, 0)
    # Itself, and a draft without scales.
    for draft in ({}, {"model": str(DEMO)}):
        ids, counted = run(answers, model, 25, mtp(2, **draft))
        assert ids == wanted
        assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


# --- a draft vocabulary -------------------------------------------------------------------------------------------


def test_a_draft_vocabulary_changes_no_answer_and_only_the_chosen_tokens_are_proposed(tmp_path, plain_answers):
    common = Counter(token for ids in plain_answers for token in ids)
    chosen = [token for token, _ in common.most_common(len(common) // 2)]
    file = tmp_path / "draft_vocab.json"
    file.write_text(json.dumps(chosen))
    options = {"additional_config": {"bailing_draft_vocab": str(file)}}
    ids, counted = run(answers, DEMO, 200, 2, **options)
    _, free = run(answers, DEMO, 200, 2)
    assert ids == plain_answers
    assert 0.3 * free["accepted_tokens"] < counted["accepted_tokens"] < free["accepted_tokens"]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"norm_head": True}], ids=str)
def test_a_draft_vocabulary_keeps_the_logits_of_its_tokens(overrides, tp_size, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1, **overrides)
    chosen = list(range(3, 256, 5))
    env = {**RPC, **(TWO_RANKS if tp_size == 2 else {})}
    wanted = run(draft_logits, model, PROMPT, env=env, tensor_parallel_size=tp_size)
    logits = run(
        draft_logits,
        model,
        PROMPT,
        env=env,
        tensor_parallel_size=tp_size,
        additional_config={"bailing_draft_vocab": chosen},
    )
    assert (logits[:, chosen] - wanted[:, chosen]).abs().max() <= TOLERANCE
    others = [token for token in range(256) if token not in chosen]
    assert torch.isneginf(logits[:, others]).all()


@pytest.mark.parametrize(
    ("given", "speculative_config", "fragment"),
    [
        ("missing.json", mtp(1), "missing.json cannot be read"),
        ([], mtp(1), "must hold a list of token ids from 0 to 255, not []"),
        ([1, 256], mtp(1), "must hold a list of token ids from 0 to 255, not [1, 256]"),
        ({"ids": [1]}, mtp(1), "must hold a list of token ids"),
        ([1, 2], None, "is for MTP drafts; add --speculative-config"),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused(given, speculative_config, fragment, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    options = {"additional_config": {"bailing_draft_vocab": given}, "speculative_config": speculative_config}
    with pytest.raises(EngineError) as refusal:
        run(make_llm, model, **options)
    assert refusal.value.message.startswith("SettingsError: ")
    assert fragment in refusal.value.message


# --- other drafts -------------------------------------------------------------------------------------------------


def test_pipeline_stages_with_a_draft_are_refused_where_vllm_has_none():
    with pytest.raises(EngineError, match="looks for the draft model in every stage") as failed:
        run(make_llm, DEMO, speculative_config=mtp(1), pipeline_parallel_size=2, env=TWO_RANKS)
    assert "leave --speculative-config out" in failed.value.message


def test_ngram_drafts_change_no_answer(plain_answers):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    ids, counted = run(answers, DEMO, 25, ngram)
    assert ids == spread(plain_answers, 25)
    assert counted["accepted_tokens"] > 0


AUX_LAYERS = [1, 2, 3]  # hidden states behind so many of four layers


def make_eagle3(folder, hidden_size=64, vocab_size=256, heads=4):
    """A random EAGLE-3 draft in the format of the published ones.

    One Llama layer behind a projection, with a head for every second token: `d2t` tells how far a draft token's id is
    from the target's, `t2d` which of the target's tokens have one.
    """
    draft_vocab_size = vocab_size // 2
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 32,
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": AUX_LAYERS, "use_aux_hidden_state": True},
        "torch_dtype": "float32",
    }
    torch.manual_seed(1)
    q_size, kv_size = heads * 32, heads // 2 * 32
    shapes = {
        "fc": (hidden_size, 3 * hidden_size),
        "midlayer.self_attn.q_proj": (q_size, 2 * hidden_size),
        "midlayer.self_attn.k_proj": (kv_size, 2 * hidden_size),
        "midlayer.self_attn.v_proj": (kv_size, 2 * hidden_size),
        "midlayer.self_attn.o_proj": (hidden_size, q_size),
        "midlayer.mlp.gate_proj": (96, hidden_size),
        "midlayer.mlp.up_proj": (96, hidden_size),
        "midlayer.mlp.down_proj": (hidden_size, 96),
        "lm_head": (draft_vocab_size, hidden_size),
    }
    tensors = {f"{name}.weight": 0.15 * torch.randn(shape) for name, shape in shapes.items()}
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        tensors[f"{name}.weight"] = torch.rand(hidden_size) + 0.5
    tensors["d2t"] = torch.arange(draft_vocab_size)  # token 2 * i less i
    tensors["t2d"] = torch.arange(vocab_size) % 2 == 0
    folder.mkdir(parents=True)
    write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def plain_eagle3_logits(target, draft, prompt):
    """What an EAGLE-3 draft computes, in plain PyTorch on the plain reference's hidden states.

    Source: EAGLE-3, arXiv 2503.01840, section 3.1; tensor names as in the published drafts.
    """
    reference = BailingMoeV2ForCausalLM.from_pretrained(target, dtype=torch.float32)
    config, w = json.loads((draft / "config.json").read_text()), read_tensors(draft)
    ids, head_dim = torch.tensor(prompt), config["head_dim"]
    states = reference(ids[None], output_hidden_states=True).hidden_states

    def norm(x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config["rms_norm_eps"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    hidden = linear(torch.cat([states[layer][0] for layer in AUX_LAYERS], -1), "fc")[:-1]
    embeds = reference.model.word_embeddings(ids[1:])
    x = torch.cat((norm(embeds, "midlayer.input_layernorm"), norm(hidden, "midlayer.hidden_norm")), -1)
    angles = torch.outer(
        torch.arange(len(x)), config["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    ).repeat(1, 2)

    def heads(name, turned):
        y = linear(x, f"midlayer.self_attn.{name}_proj").view(len(x), -1, head_dim).transpose(0, 1)
        first, second = y.chunk(2, -1)
        return y * angles.cos() + torch.cat((-second, first), -1) * angles.sin() if turned else y

    attended = torch.nn.functional.scaled_dot_product_attention(
        heads("q", True)[None], heads("k", True)[None], heads("v", False)[None], is_causal=True, enable_gqa=True
    )[0]
    hidden = hidden + linear(attended.transpose(0, 1).flatten(1), "midlayer.self_attn.o_proj")
    y = norm(hidden, "midlayer.post_attention_layernorm")
    gated = torch.nn.functional.silu(linear(y, "midlayer.mlp.gate_proj")) * linear(y, "midlayer.mlp.up_proj")
    return linear(norm(hidden + linear(gated, "midlayer.mlp.down_proj"), "norm"), "lm_head")


def test_an_eagle3_draft_gets_the_hidden_states_it_was_trained_on(tmp_path):
    target = make_checkpoint(tmp_path / "target", num_hidden_layers=4)
    draft = make_eagle3(tmp_path / "draft")
    eagle3 = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    logits = run(draft_logits, target, PROMPT, eagle3, env=RPC)
    wanted = plain_eagle3_logits(target, draft, PROMPT)
    assert torch.isneginf(logits[:, 1::2]).all()
    assert (logits[:, ::2].log_softmax(-1) - wanted.log_softmax(-1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_eagle3_drafts_change_no_answer(mode, tmp_path, plain_answers):
    draft = make_eagle3(tmp_path / "draft", hidden_size=128, vocab_size=1024)
    eagle3 = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    ids, counted = run(answers, DEMO, 25, eagle3, enforce_eager=mode == "eager")
    assert ids == spread(plain_answers, 25)
    assert counted["drafts"] > 0
