"""Weights that a trainer sends to a running engine: equal to a fresh load, or refused with the old answers intact.

The judge is the plain reference with the weights that the engine should have.
"""

import random
import shutil
from functools import partial
from pathlib import Path
from zlib import crc32

import pytest
import torch

from tests.support.checkpoints import (
    PROMPT,
    Judge,
    make_checkpoint,
    plain_answer,
    read_tensors,
    small_config,
    write_tensors,
)
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, ask, make_llm, run, run_in_turn
from tests.support.quantized import DEQUANTIZE, quantize
from tests.support.versions import PARTS_OF_EXPERTS, since
from vllm_bailing import DEMO, DEMO_ADAPTER

SIZES = {"num_nextn_predict_layers": 0}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates")
    return [make_checkpoint(folder / str(seed), seed=seed, **SIZES) for seed in range(2)]


def served(llm, prompt=PROMPT):
    llm.reset_prefix_cache()
    return ask(llm, [prompt], max_tokens=1)[0][0]


def differs(llm, judge, tensors, prompt=PROMPT):
    difference = (served(llm, prompt) - judge.logprobs(tensors, prompt)).abs()
    return float(difference.nan_to_num(nan=torch.inf).max())  # NaN is above no tolerance


# ---- ways of sending: what reaches the engine is a list of calls -----------------------------------------------------


def reload(llm, items):
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(items)})


def load(llm, items):
    """As some trainers do: past vLLM's reload, on the model itself."""
    llm.collective_rpc(partial(_load, items=items))


def _load(worker, items):
    worker.model_runner.model.load_weights(items)


def session(llm, *portions):
    """What vLLM's weight transfer engines do between `start_weight_update` and `finish_weight_update`."""
    llm.collective_rpc(partial(_session, portions=portions))


def _session(worker, portions):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.model_runner.model
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        for portion in portions:
            model.load_weights(portion)
        finalize_layerwise_reload(model, worker.vllm_config.model_config)


def by_layer(name):
    return name.split(".")[2] if ".layers." in name else name


def grouped(tensors, key):
    groups = {}
    for name, tensor in tensors.items():
        groups.setdefault(key(name), []).append((name, tensor))
    return list(groups.values())


def cut(items, count):
    return [items[start : start + count] for start in range(0, len(items), count)]


def one_by_one(tensors, prefix):
    """The tensors behind `prefix` one by one, the others together: every call costs a tenth of a second."""
    items = list(tensors.items())
    return [[item] for item in items if item[0].startswith(prefix)] + [
        [item for item in items if not item[0].startswith(prefix)]
    ]


def renamed(prefix):
    return lambda llm, new: reload(llm, [(f"{prefix}{name}", tensor) for name, tensor in new.items()])


def each(send, portions_of):
    def send_all(llm, new):
        for portion in portions_of(new):
            send(llm, portion)

    return send_all


WAYS = {
    "whole": lambda llm, new: reload(llm, list(new.items())),
    "whole, backwards": lambda llm, new: reload(llm, list(new.items())[::-1]),
    "a call per layer": each(reload, lambda new: grouped(new, by_layer)),
    "buckets cut anywhere": each(reload, lambda new: cut(list(new.items()), 7)),
    "one tensor at a time": each(reload, lambda new: one_by_one(new, "model.layers.1.")),
    "on the model, whole": lambda llm, new: load(llm, list(new.items())),
    "on the model, per tensor": each(load, lambda new: one_by_one(new, "model.layers.2.")),
    "a session of one": lambda llm, new: session(llm, list(new.items())),
    "a session of buckets": lambda llm, new: session(llm, *cut(list(new.items()), 7)),
    "from DDP": renamed("module."),
    "from torch.compile": renamed("_orig_mod."),
    "from an actor": renamed("actor.module."),
    "from FSDP": lambda llm, new: reload(
        llm, [(name.replace(".mlp.", "._fsdp_wrapped_module.mlp."), tensor) for name, tensor in new.items()]
    ),
    "in fp32": lambda llm, new: reload(llm, [(name, tensor.float()) for name, tensor in new.items()]),
    "split projections": lambda llm, new: reload(llm, _split(new)),
    "stacked experts": lambda llm, new: reload(llm, _stacked(new)),
}


def _split(tensors):
    config, items = small_config(**SIZES), []
    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    for name, tensor in tensors.items():
        if ".query_key_value." in name:
            parts = zip("qkv", tensor.split(sizes), strict=True)
            items += [(name.replace("query_key_value", f"{which}_proj"), part) for which, part in parts]
        else:
            items.append((name, tensor))
    return items


def _stacked(tensors):
    stacks, items = {}, []
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".mlp.experts.")
        if rest:
            stacks.setdefault(f"{head}.mlp.experts.{rest.split('.')[1]}", {})[int(rest.split(".")[0])] = tensor
        else:
            items.append((name, tensor))
    return items + [(name, torch.stack([stack[e] for e in range(len(stack))])) for name, stack in stacks.items()]


def _every_way(folders, **options):
    (old, new), judge = [read_tensors(folder) for folder in folders], Judge(**SIZES)
    llm, found = make_llm(folders[0], **options), {}
    for turn, (name, way) in enumerate(WAYS.items()):
        sent = (new, old)[turn % 2]
        way(llm, sent)
        found[name] = differs(llm, judge, sent)
    return found


@PARTS_OF_EXPERTS
def test_however_weights_are_sent_the_engine_has_them(checkpoints):
    found = run_in_turn(_every_way, checkpoints)
    assert {name: value for name, value in found.items() if value > TOLERANCE} == {}


# ---- parts -----------------------------------------------------------------------------------------------------------


def _parts(folders, choices, **options):
    (old, new), judge = [read_tensors(folder) for folder in folders], Judge(**SIZES)
    llm, found = make_llm(folders[0], **options), {}
    has = dict(old)
    for turn, (title, send, part) in enumerate(choices):
        chosen = {name: tensor for name, tensor in (new, old)[turn % 2].items() if part(name)}
        assert chosen
        send(llm, list(chosen.items()))
        has |= chosen
        found[title] = differs(llm, judge, has)
    return found


PARTS = {
    "all but buffers": lambda name: not name.endswith("expert_bias"),
    "buffers": lambda name: name.endswith("expert_bias"),
    "one expert": lambda name: ".2.mlp.experts.3." in name,
    "one projection of an expert": lambda name: ".1.mlp.experts.0.down_proj" in name,
    "half of a fused projection": lambda name: "layers.0.mlp.gate_proj" in name,
    "the router": lambda name: name.endswith("mlp.gate.weight"),
    "shared experts' second half": lambda name: "shared_experts.up_proj" in name,
    "the embedding": lambda name: "word_embeddings" in name,
    "every second tensor": lambda name: crc32(name.encode()) % 2 == 0,
}
CHOICES = [(f"{part} by {send.__name__}", send, choice) for part, choice in PARTS.items() for send in (reload, load)]


@PARTS_OF_EXPERTS
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_part_is_replaced_and_the_rest_stays(ranks, checkpoints):
    options = {"env": TWO_RANKS, "tensor_parallel_size": 2} if ranks == 2 else {}
    choices = [
        (title, send, _Part(part)) for title, send, part in [(t, s, t.rpartition(" by ")[0]) for t, s, _ in CHOICES]
    ]
    found = run_in_turn(_parts, checkpoints, choices, **options)
    assert {title: value for title, value in found.items() if value > TOLERANCE} == {}


class _Part:
    """A choice of `PARTS` that can be pickled."""

    def __init__(self, title):
        self.title = title

    def __call__(self, name):
        return PARTS[self.title](name)


def _exactly(folders, dtype):
    """Log-probabilities after a part by part update, and after a whole one to the same weights."""
    (old, new), llm = [read_tensors(folder) for folder in folders], make_llm(folders[0], dtype=dtype)
    found = []
    for title in PARTS:
        part = {name: tensor for name, tensor in new.items() if PARTS[title](name)}
        reload(llm, list(old.items()))
        reload(llm, list(part.items()))
        in_part = served(llm)
        reload(llm, list((old | part).items()))
        found.append((title, torch.equal(in_part, served(llm))))
    return found


@PARTS_OF_EXPERTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_leaves_the_very_numbers_of_a_whole_update(dtype, checkpoints):
    assert [title for title, same in run_in_turn(_exactly, checkpoints, dtype) if not same] == []


# ---- anything --------------------------------------------------------------------------------------------------------

SPOILED = {
    "a stranger": lambda name, tensor: ("model.layers.1.mlp.gate.stranger", tensor),
    "another shape": lambda name, tensor: (name, tensor[..., :-1]),
    "integers": lambda name, tensor: (name, tensor.to(torch.int8)),
    "a layer too many": lambda name, tensor: (name.replace("layers.1.", "layers.9."), tensor[..., :-1]),
    "twice": None,
}


def _random_updates(folders, seeds):
    (old, new), judge = [read_tensors(folder) for folder in folders], Judge(**SIZES)
    llm, has, wrong, refused = make_llm(folders[0]), dict(old), [], 0
    prompt = PROMPT[:12]
    for seed in seeds:
        rng = random.Random(seed)
        source = rng.choice((old, new))
        names = rng.sample(sorted(source), rng.choice([1, 2, 5, 20, len(source)]))
        if rng.random() < 0.5:
            names.sort()
        items = [(name, source[name]) for name in names]
        size = rng.choice([1, 3, 10, len(items)])
        portions = cut(items, max(size, len(items) // 6))
        is_spoiled = rng.random() < 0.3
        if is_spoiled:
            spoil = rng.choice(sorted(SPOILED))
            place = rng.randrange(len(items))
            change = SPOILED[spoil]
            spoiled = items + items[place : place + 1] if change is None else list(items)
            if change is not None:
                spoiled[place] = change(*items[place])
            portions = [spoiled]
        send = rng.choice([reload, load, session])
        try:
            if send is session:
                send(llm, *portions)
            else:
                for portion in portions:
                    send(llm, portion)
            has |= dict(items)
            if is_spoiled and spoil != "a layer too many":
                wrong.append((seed, "not refused", spoil))
        except Exception as error:
            refused += 1
            if "\n" in str(error) or not is_spoiled:
                wrong.append((seed, str(error)))
        if (off := differs(llm, judge, has, prompt)) > TOLERANCE:
            wrong.append((seed, send.__name__, off))
    return wrong, refused


@PARTS_OF_EXPERTS
def test_random_updates_end_in_the_weights_sent_or_in_a_refusal(checkpoints, random_cases):
    """Random cuts, orders and subsets, some of them spoiled."""
    wrong, refused = run_in_turn(_random_updates, checkpoints, range(random_cases), timeout=3600)
    assert wrong == []
    assert refused > random_cases / 10


# ---- refusals --------------------------------------------------------------------------------------------------------


def _refusal(folders, items, send=reload, **options):
    llm = make_llm(folders[0], **options)
    before = served(llm)
    try:
        send(llm, items)
    except Exception as error:
        assert torch.equal(before, served(llm))
        return str(error)
    return ""


def test_adapter_tensors_are_refused_by_name(checkpoints):
    items = [("base_model.model.model.layers.0.attention.dense.lora_A.weight", torch.zeros(4, 128))]
    message = run_in_turn(_refusal, checkpoints, items)
    assert message.startswith("the update does not fit the model: 1 unexpected (model.layers.0.attention.dense.lora_A")
    assert "merge it" in message and "\n" not in message


def _from_folder(folder, other):
    llm = make_llm(folder)
    before = served(llm)
    with pytest.raises(
        Exception, match="has other values of routed_scaling_factor than the running model's"
    ) as refusal:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert torch.equal(before, served(llm))
    llm.collective_rpc("reload_weights")  # of its own folder still
    return torch.equal(before, served(llm)), str(refusal.value)


def test_another_models_folder_is_refused(checkpoints, tmp_path):
    other = make_checkpoint(tmp_path, routed_scaling_factor=1.5)
    same, message = run_in_turn(_from_folder, checkpoints[0], other)
    assert same and "start another engine" in message


# ---- dummies ---------------------------------------------------------------------------------------------------------


def _dummy(folder, portions, send=reload):
    llm = make_llm(folder, load_format="dummy")
    tensors = read_tensors(folder)
    for portion in portions:
        send(llm, [(name, tensors[name]) for name in portion])
    return served(llm)


@PARTS_OF_EXPERTS
def test_dummy_weights_are_replaced_in_any_portions(checkpoints):
    names = sorted(read_tensors(checkpoints[0]))
    wanted = plain_answer(checkpoints[0], PROMPT)[0]
    assert (run(_dummy, checkpoints[0], cut(names, 11)) - wanted).abs().max() <= TOLERANCE


# ---- quantized -------------------------------------------------------------------------------------------------------


def _dequantized_then(folder, sent):
    llm = make_llm(folder, **DEQUANTIZE)
    before = served(llm)
    reload(llm, list(sent.items())[:9])
    reload(llm, list(sent.items())[9:])
    after = served(llm)
    llm.collective_rpc("reload_weights")  # of its own folder
    assert torch.equal(before, served(llm))
    return after


@pytest.mark.parametrize("scheme", ["fp8", "gptq", "w8a8"])
def test_a_model_that_was_dequantized_takes_plain_tensors(scheme, checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints[0], tmp_path / "quantized"))
    quantize(folder, scheme)
    answer = run_in_turn(_dequantized_then, folder, read_tensors(checkpoints[1]))
    assert (answer - plain_answer(checkpoints[1], PROMPT)[0]).abs().max() <= TOLERANCE


# ---- sleep -----------------------------------------------------------------------------------------------------------


def _slept(worker):
    """What a sleep of level 2 and waking up leave: buffers as they were, parameters of any bytes."""
    for parameter in worker.model_runner.model.parameters():
        parameter.data.view(torch.uint8).random_()


def _sleeping(folders, portions, send):
    from vllm.platforms import current_platform

    type(current_platform).is_sleep_mode_available = lambda self: True  # of CPUs, on which vLLM ignores to sleep
    llm = make_llm(folders[0], enable_sleep_mode=True)
    new = read_tensors(folders[1])
    reload(llm, list(read_tensors(folders[0]).items()))  # an update before the sleep is none after it
    llm.collective_rpc(_slept)
    for portion in portions:
        send(llm, [(name, new[name]) for name in portion])
    return served(llm)


@pytest.mark.parametrize("send", [reload, load, session])
@pytest.mark.parametrize("size", [1000, pytest.param(7, marks=PARTS_OF_EXPERTS)])
def test_parameters_alone_wake_a_model_that_slept_deeply(checkpoints, send, size, tmp_path):
    """Parameters of the second checkpoint, beside the first one's buffers."""
    olds, news = map(read_tensors, checkpoints)
    names = [name for name in news if not name.endswith("expert_bias")]
    mixed = {name: news[name] if name in names else olds[name] for name in news}
    folder = Path(shutil.copytree(checkpoints[1], tmp_path / "mixed"))
    write_tensors(folder, mixed)
    wanted = plain_answer(folder, PROMPT)[0]
    assert (run(_sleeping, checkpoints, cut(names, size), send) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize("left_out", ["model.layers.2.mlp.experts.3.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("send", [reload, load, session])
def test_what_a_deep_sleep_discarded_is_refused_by_name(checkpoints, send, left_out):
    names = [name for name in read_tensors(checkpoints[0]) if name != left_out]
    with pytest.raises(EngineError) as refusal:
        run(_sleeping, checkpoints, [names], send)
    assert left_out in refusal.value.message and "discarded when the engine slept" in refusal.value.message


@pytest.mark.parametrize("send", [reload, load, session])
def test_what_never_had_a_value_is_refused_by_name(send, checkpoints):
    names = [name for name in sorted(read_tensors(checkpoints[0])) if not name.endswith("expert_bias")]
    with pytest.raises(EngineError, match="expert_bias") as refusal:
        run(_dummy, checkpoints[0], [names], send)
    assert (
        "2 tensors (model.layers.1.mlp.gate.expert_bias, model.layers.2.mlp.gate.expert_bias)" in refusal.value.message
    )


# ---- beside other features -------------------------------------------------------------------------------------------


def _files(folder, **keys):
    llm = make_llm(folder, **keys)
    before = ask(llm, [PROMPT])
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return before[0], ask(llm, [PROMPT])[0]


def test_reloading_leaves_the_same_model(checkpoints):
    before, after = run_in_turn(_files, checkpoints[0])
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def _other_folder(folder, other):
    llm = make_llm(folder)
    ask(llm, [PROMPT])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    llm.reset_prefix_cache()
    return ask(llm, [PROMPT])[0]


def test_reloading_other_weights_serves_those(checkpoints):
    wanted, wanted_ids = plain_answer(checkpoints[1], PROMPT)
    logprobs, token_ids = run_in_turn(_other_folder, *checkpoints)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


def _with_adapters(demo, items):
    from vllm.lora.request import LoRARequest

    llm = make_llm(demo, enable_lora=True, max_lora_rank=16)
    prompt, adapter = list(range(5, 45)), LoRARequest("sailor", 1, str(DEMO_ADAPTER))
    before = ask(llm, [prompt], adapters=[adapter])[0][0], ask(llm, [prompt])[0][0]
    reload(llm, items)
    llm.reset_prefix_cache()
    after = ask(llm, [prompt], adapters=[adapter])[0][0], ask(llm, [prompt])[0][0]
    return [torch.equal(*pair) for pair in zip(before, after, strict=True)]


@since("0.32", "weight updates beneath adapters")
def test_adapters_outlive_an_update_of_their_base():
    tensors = read_tensors(DEMO)
    some = [(name, tensor) for name, tensor in tensors.items() if crc32(name.encode()) % 3]
    assert run(_with_adapters, DEMO, some) == [True, True]


def _with_drafts(folder, new):
    from tests.support.speculation import mtp

    llm = make_llm(folder, speculative_config=mtp(1))
    reload(llm, new)
    return served(llm)


def test_mtp_layers_in_an_update_are_the_drafts_affair(tmp_path):
    folders = [make_checkpoint(tmp_path / str(seed), seed=seed, num_nextn_predict_layers=1) for seed in range(2)]
    wanted = plain_answer(folders[1], PROMPT)[0]
    logprobs = run(_with_drafts, folders[0], list(read_tensors(folders[1]).items()))
    assert (logprobs - wanted).abs().max() <= TOLERANCE


def _draft_session(folder, new, file):
    from safetensors.torch import save_file

    from tests.support import weight_files
    from tests.support.speculation import mtp

    llm = make_llm(folder, speculative_config=mtp(1), weight_transfer_config={"backend": weight_files.BACKEND})
    before = ask(llm, [PROMPT])[0][1]
    save_file({name: tensor for name, tensor in new.items() if ".layers.3." in name}, file)
    llm.start_draft_weight_update()
    llm.update_weights({"update_info": {"file": str(file)}})
    llm.finish_weight_update()
    llm.reset_prefix_cache()
    layer = llm.llm_engine.model_executor.driver_worker.worker.get_draft_model().model.layers["3"]
    return before, ask(llm, [PROMPT])[0][1], layer.enorm.weight.clone(), layer.mlp.gate.expert_bias.clone()


def test_a_draft_is_updated_in_a_session_of_its_own(tmp_path):
    folders = [make_checkpoint(tmp_path / str(seed), seed=seed, num_nextn_predict_layers=1) for seed in range(2)]
    new = read_tensors(folders[1])
    before, after, norm, bias = run(_draft_session, folders[0], new, tmp_path / "draft.safetensors")
    assert before == after
    assert torch.equal(norm, new["model.layers.3.enorm.weight"].float())
    assert torch.equal(bias, new["model.layers.3.mlp.gate.expert_bias"])


def _while_requests_run(folders):
    from vllm import SamplingParams

    llm, new = make_llm(folders[0]), read_tensors(folders[1])
    engine = llm.llm_engine
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, detokenize=False)
    engine.add_request("running", {"prompt_token_ids": PROMPT}, params)
    tokens = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = len(output.outputs[0].token_ids)
        if tokens == 10:
            reload(llm, list(new.items()))
    return tokens, served(llm)


def test_requests_go_on_during_an_update(checkpoints):
    tokens, logprobs = run_in_turn(_while_requests_run, checkpoints)
    assert tokens == 30
    assert (logprobs - plain_answer(checkpoints[1], PROMPT)[0]).abs().max() <= TOLERANCE


# ---- a head that is the embedding ------------------------------------------------------------------------------------


def _tied(folders, stored_head):
    (old, new), judge = [read_tensors(folder) for folder in folders], Judge(tie_word_embeddings=True)
    if stored_head:
        write_tensors(folders[0], {**old, "lm_head.weight": old["model.word_embeddings.weight"].clone()})
    llm, found = make_llm(folders[0]), []
    for sent in (new, old, {"model.word_embeddings.weight": new["model.word_embeddings.weight"]}):
        for send in (reload, load):
            send(llm, list(sent.items()))
            has = old | sent
            found.append(differs(llm, judge, has | {"lm_head.weight": has["model.word_embeddings.weight"]}))
    return max(found)


@pytest.mark.parametrize("stored_head", [False, True])
def test_a_tied_head_follows_the_embedding(stored_head, tmp_path):
    folders = [make_checkpoint(tmp_path / str(seed), seed=seed, tie_word_embeddings=True) for seed in range(2)]
    assert run_in_turn(_tied, folders, stored_head) <= TOLERANCE


def test_another_head_beside_a_tied_embedding_is_refused(tmp_path):
    model = make_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = read_tensors(model)
    write_tensors(model, {**tensors, "lm_head.weight": tensors["model.word_embeddings.weight"] + 1})
    with pytest.raises(EngineError, match=r"tie_word_embeddings=true in config\.json, but lm_head.weight is there"):
        run_in_turn(_files, model)
