"""LoRA adapters as PEFT and LLaMA-Factory write them, and checkpoints that they are merged into."""

from __future__ import annotations

import json
import math
import re
import shutil

import torch
from safetensors.torch import save_file

from tests.support.checkpoints import read_tensors, write_tensors
from tests.support.engine import ask, make_llm
from tests.support.speculation import counters
from vllm_bailing import DEMO_ADAPTER

ATTENTION = ("query_key_value", "dense")
MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS_NAME = ".mlp.experts."


def make_adapter(folder, model, targets, rank=4, alpha=8, seed=0, keep=lambda module: EXPERTS_NAME not in module):
    """Write an adapter of all modules whose name ends in one of `targets`, as far as `keep` wants them."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in read_tensors(model).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and weight.dim() == 2 and keep(module):
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(rank, weight.shape[1], generator=draw)
            tensors[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], rank, generator=draw)
    assert tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def scale_in_peft(config, module):
    """What PEFT multiplies B A of `module` by, by its documentation of the keys."""

    def of(pattern, default):
        return next(
            (v for k, v in (config.get(pattern) or {}).items() if re.fullmatch(rf"(.*\.)?({k})", module)), default
        )

    rank = of("rank_pattern", config["r"])
    return of("alpha_pattern", config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def merged(model, adapter, out):
    """A copy of `model` in fp32 with the adapter's products added to its weights."""
    shutil.copytree(model, out)
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes, tensors = read_tensors(adapter), {name: tensor.float() for name, tensor in read_tensors(model).items()}
    for name in list(changes):
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = changes[name.replace("lora_A", "lora_B")].float() @ changes[name].float()
            if f"{module}.weight" in tensors:  # not of an MTP layer that the model lacks
                tensors[f"{module}.weight"] += scale_in_peft(config, module) * product
    write_tensors(out, tensors)
    (out / "config.json").write_text(
        json.dumps({**json.loads((model / "config.json").read_text()), "torch_dtype": "float32"})
    )
    return out


def changed_adapter(folder, change, adapter=DEMO_ADAPTER):
    """A copy of `adapter` after `change(tensors, config)`; both may be changed in place."""
    tensors = read_tensors(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(tensors, config)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


QKV = "base_model.model.model.layers.1.attention.query_key_value.lora"
GATE_UP = "base_model.model.model.layers.2.mlp.shared_experts"
DEMO_RANK = 8


def setting(**keys):
    """A change of adapter_config.json; None removes a key."""

    def change(tensors, config):
        config.update(keys)
        for key in [key for key, value in config.items() if value is None]:
            del config[key]

    return change


def _each(function, when=lambda name: True):
    """A change of every tensor."""

    def change(tensors, config):
        tensors.update({name: function(tensor) for name, tensor in tensors.items() if when(name)})

    return change


def _renamed(old, new):
    def change(tensors, config):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _only(part):
    def change(tensors, config):
        for name in [name for name in tensors if part not in name]:
            del tensors[name]

    return change


def _with_ranks(part, rank, key="rank_pattern"):
    """Factors of another rank for modules whose name ends in `part`."""

    def change(tensors, config):
        draw = torch.Generator().manual_seed(rank)
        for name in [name for name in tensors if f"{part}.lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            tensors[name] = 0.1 * torch.randn(rank, tensors[name].shape[1], generator=draw)
            tensors[other] = 0.1 * torch.randn(tensors[other].shape[0], rank, generator=draw)
        config[key] = {part: rank}

    return change


def _and(*changes):
    def change(tensors, config):
        for one in changes:
            one(tensors, config)

    return change


def _with_mtp_layer(tensors, config):
    for name in [name for name in tensors if ".layers.3." in name]:
        tensors[name.replace(".layers.3.", ".layers.4.")] = torch.ones_like(tensors[name])


def _added(name, *shape, dtype=torch.float32):
    def change(tensors, config):
        tensors[name] = torch.ones(shape).to(dtype)

    return change


# Changes of the demo's adapter with which it still is one: to be served as if it were merged.
SERVED = {
    "as_it_is": setting(),
    "names_without_prefix": _renamed("base_model.model.", ""),
    "float16": _each(torch.Tensor.half),
    "float64": _each(torch.Tensor.double),
    "other_keys": setting(peft_version="0.18.0", inference_mode=True, layers_to_transform=None, bias=None),
    "keys_that_are_off": setting(use_dora=False, modules_to_save=[], rank_pattern={}, init_lora_weights=True),
    "plain_initialization": setting(init_lora_weights="gaussian"),
    "rslora": setting(use_rslora=True),
    "negative_alpha": setting(lora_alpha=-4),
    "fraction_of_alpha": setting(lora_alpha=0.5),
    "alpha_pattern": setting(alpha_pattern={"dense": 3, r"layers\.2\.mlp.*": 40}),
    "first_pattern_wins": setting(alpha_pattern={"layers.0.attention.dense": 64, "dense": 1}, use_rslora=True),
    "rank_pattern": _with_ranks("up_proj", 3),
    "higher_rank_of_some": _with_ranks("query_key_value", 16),
    "attention_alone": _only(".attention."),
    "gate_without_up": _only("gate_proj"),
    "one_layer": _only(".layers.2."),
    "one_module": _only("layers.1.attention.dense"),
    "b_of_zeros": _each(torch.zeros_like, lambda name: "lora_B" in name and "dense" in name),
    "mtp_layer_too": _with_mtp_layer,
    "copy_of_the_head": _added("base_model.model.lm_head.base_layer.weight", 1024, 128),
    "large": _each(lambda tensor: 8 * tensor),
}

# Changes with which it cannot be served: words of the refusal.
REFUSED = {
    "half_of_a": (
        lambda t, c: t.update({f"{QKV}_A.weight": t[f"{QKV}_A.weight"][:, :64]}),
        "[8, 64], wanted is [8, 128]",
    ),
    "half_of_every_a": (
        _each(lambda x: x[:, : x.shape[1] // 2], lambda n: "lora_A" in n),
        "20 factor(s) are of the wrong",
    ),
    "wider_a": (lambda t, c: t.update({f"{QKV}_A.weight": torch.ones(8, 256)}), "[8, 256], wanted is [8, 128]"),
    "shorter_b": (
        lambda t, c: t.update({f"{QKV}_B.weight": t[f"{QKV}_B.weight"][:128]}),
        "[128, 8], wanted is [256, 8]",
    ),
    "longer_b": (lambda t, c: t.update({f"{QKV}_B.weight": torch.ones(257, 8)}), "[257, 8], wanted is [256, 8]"),
    "b_of_one_row": (lambda t, c: t.update({f"{QKV}_B.weight": torch.ones(1, 8)}), "[1, 8]"),
    "transposed": (_each(torch.Tensor.t), "40 factor(s) are of the wrong shape"),
    "a_vector": (lambda t, c: t.update({f"{QKV}_A.weight": torch.ones(128)}), "[128], wanted is [8, 128]"),
    "an_extra_dimension": (_each(lambda x: x[None]), "40 factor(s)"),
    "no_elements": (lambda t, c: t.update({f"{QKV}_A.weight": torch.ones(0, 128)}), "[0, 128]"),
    "narrow_gate": (
        lambda t, c: t.update({f"{GATE_UP}.gate_proj.lora_B.weight": torch.ones(32, 8)}),
        "gate_proj.lora_B.weight is [32, 8], wanted is [64, 8]",
    ),
    "narrow_down": (
        lambda t, c: t.update({f"{GATE_UP}.down_proj.lora_A.weight": torch.ones(8, 32)}),
        "[8, 32], wanted is [8, 64]",
    ),
    "rank_of_the_config": (setting(r=4), "another rank than r=4"),
    "rank_of_one_factor": (
        lambda t, c: t.update({f"{QKV}_A.weight": torch.ones(4, 128)}),
        "[4, 128], wanted is [8, 128]",
    ),
    "rank_of_one_module": (
        _and(_with_ranks("dense", 4), setting(rank_pattern=None)),
        "8 factor(s) are of the wrong shape",
    ),
    "rank_pattern_alone": (setting(rank_pattern={"dense": 4}), "8 factor(s) are of the wrong shape"),
    "a_without_b": (lambda t, c: t.pop(f"{QKV}_B.weight"), "query_key_value has only lora_A"),
    "b_without_a": (lambda t, c: t.pop(f"{QKV}_A.weight"), "query_key_value has only lora_B"),
    "no_b_at_all": (_only("lora_A"), "20 module(s) lack a factor"),
    "nan": (lambda t, c: t[f"{QKV}_A.weight"][3, 5:6].fill_(math.nan), "1 module(s) have values that are NaN"),
    "infinite": (lambda t, c: t[f"{QKV}_B.weight"][3, 5:6].fill_(-math.inf), "layers.1.attention.query_key_value"),
    "nan_beside_zeros": (
        lambda t, c: (t[f"{QKV}_B.weight"].zero_(), t[f"{QKV}_A.weight"].fill_(math.nan)),
        "1 module(s) have values",
    ),
    "overflow": (_each(lambda x: x.float() * 1e30), "too large for float32"),
    "overflow_of_a_double": (_each(lambda x: x.double() * 1e200), "too large for float32"),
    "overflow_by_alpha": (_and(_each(lambda x: x.float() * 1e8), setting(lora_alpha=9e29)), "too large for float32"),
    "integers": (_each(lambda x: x.to(torch.int8)), "40 factor(s) are of a kind"),
    "one_integer": (lambda t, c: t.update({f"{QKV}_A.weight": torch.ones(8, 128, dtype=torch.int64)}), "of I64"),
    "booleans": (_each(lambda x: x > 0), "of BOOL"),
    "empty": (lambda t, c: t.clear(), "nothing would change"),
    "mtp_layer_alone": (_and(_with_mtp_layer, _only(".layers.4.")), "nothing would change"),
    "layers_past_the_model": (_renamed(".layers.3.", ".layers.7."), "the model has no such modules"),
    "a_layer_of_no_number": (_renamed(".layers.3.", ".layers.\u00b3."), "the model has no such modules"),
    "modules_of_another_family": (_renamed("query_key_value", "qkv_proj"), "the model has no such modules"),
    "fused_gate_and_up": (_renamed("gate_proj", "gate_up_proj"), "the model has no such modules"),
    "an_mlp_in_an_expert_layer": (_renamed(".layers.0.", ".layers.1."), "3 module(s) that would be ignored"),
    "vision": (_renamed("model.model.layers", "model.vision.layers"), "20 module(s) that would be ignored"),
    "router": (_renamed("attention.dense", "mlp.gate"), "or its router"),
    "head": (
        lambda t, c: (
            t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(8, 128)}),
            t.update({"base_model.model.lm_head.lora_B.weight": torch.ones(1024, 8)}),
        ),
        "down_proj lm_head",
    ),
    "embedding": (
        lambda t, c: (
            t.update({"base_model.model.model.word_embeddings.lora_embedding_A": torch.ones(8, 1024)}),
            t.update({"base_model.model.model.word_embeddings.lora_embedding_B": torch.ones(128, 8)}),
        ),
        "down_proj embed_tokens",
    ),
    "an_expert": (_renamed("shared_experts", "experts.3"), "9 module(s) that would be ignored"),
    "fused_experts": (_renamed("shared_experts.gate_proj", "experts.base_layer"), "would be ignored"),
    "names_of_a_wrapped_module": (_renamed("lora_A.weight", "lora_A.default.weight"), "20 tensor(s) of"),
    "no_weight_in_the_name": (_renamed(".weight", ""), "40 tensor(s) of"),
    "an_embedding_of_a_linear_layer": (
        _renamed("lora_A.weight", "lora_embedding_A"),
        "of a kind that PEFT does not store",
    ),
    "magnitudes": (_added(f"{QKV}_magnitude_vector", 256), "are no LoRA factors"),
    "bias_of_b": (_added(f"{QKV}_B.bias", 256), "are no LoRA factors"),
    "a_whole_module": (_added("base_model.model.model.norm.weight", 128), "are no LoRA factors (base_model"),
    "another_vocabulary": (_added("base_model.model.lm_head.base_layer.weight", 1030, 128), "save_embedding_layers"),
    "copy_of_the_embedding": (
        _added("base_model.model.model.word_embeddings.base_layer.weight", 1024, 128),
        "save_embed",
    ),
    "a_name_of_two_lines": (_added("a\nb\x1b[31m", 1), r"a\nb\x1b[31m"),
    "twice": (
        lambda t, c: t.update({f"{QKV}_A.weight".removeprefix("base_model.model."): torch.ones(8, 128)}),
        "twice",
    ),
    "dora": (setting(use_dora=True), "use_dora=true"),
    "lora_bias": (setting(lora_bias=True), "lora_bias=true"),
    "bias": (setting(bias="lora_only"), "bias='lora_only'"),
    "bias_of_nothing": (
        lambda t, c: c.update(bias=None),
        'bias=null in adapter_config.json is no setting; write "none"',
    ),
    "modules_to_save": (setting(modules_to_save=["lm_head"]), 'modules_to_save=["lm_head"]'),
    "a_classifier": (setting(modules_to_save=["score"]), 'modules_to_save=["score"]'),
    "fan_in_fan_out": (setting(fan_in_fan_out=True), "fan_in_fan_out=true"),
    "layer_replication": (setting(layer_replication=[[0, 2], [1, 3]]), "layer_replication=[[0, 2], [1, 3]]"),
    "target_parameters": (setting(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters"),
    "trained_tokens": (setting(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "activated": (setting(alora_invocation_tokens=[5]), "alora_invocation_tokens=[5]"),
    "block_diagonal": (setting(use_bdlora={"nblocks": 2}), "use_bdlora"),
    "qalora": (setting(use_qalora=True), "use_qalora=true"),
    "arrow": (setting(arrow_config={"top_k": 2}), "arrow_config"),
    "pissa": (setting(init_lora_weights="pissa_niter_4"), "changes the base model too"),
    "olora": (setting(init_lora_weights="olora"), "changes the base model too"),
    "another_method": (setting(peft_type="LOHA"), "peft_type='LOHA'"),
    "prompts": (setting(peft_type="PREFIX_TUNING"), "is not LORA"),
    "rank_above": (
        _and(_with_ranks("dense", 32), setting(rank_pattern={"dense": 32})),
        "rank 32 is above --max-lora-rank 16",
    ),
    "rank_of_all_above": (setting(r=64), "rank 64 is above --max-lora-rank 16"),
    "no_rank": (setting(r=None), "has no r;"),
    "no_alpha": (setting(lora_alpha=None), "has no lora_alpha;"),
    "no_targets": (setting(target_modules=None), "has no target_modules;"),
    "rank_zero": (setting(r=0), "r=0"),
    "rank_of_text": (setting(r="8"), 'r="8"'),
    "rank_of_truth": (setting(r=True), "r=true"),
    "rank_with_a_point": (setting(r=8.0), "r=8.0"),
    "alpha_zero": (setting(lora_alpha=0), "lora_alpha=0"),
    "alpha_nan": (setting(lora_alpha=math.nan), "lora_alpha=NaN"),
    "alpha_infinite": (setting(lora_alpha=math.inf), "lora_alpha=Infinity"),
    "alpha_of_text": (setting(lora_alpha="16"), 'lora_alpha="16"'),
    "alpha_beyond_floats": (setting(lora_alpha=10**400), "lora_alpha=1000"),
    "alpha_of_a_pattern": (setting(alpha_pattern={"dense": 0}), 'alpha_pattern["dense"]=0'),
    "rank_of_a_pattern": (setting(rank_pattern={"dense": -1}), 'rank_pattern["dense"]=-1'),
    "pattern_of_a_list": (setting(rank_pattern=["dense"]), "rank_pattern in adapter_config.json holds a list"),
    "pattern_that_is_none": (setting(alpha_pattern={"(": 1}), "is no regular expression"),
    "rslora_of_text": (setting(use_rslora="false"), "use_rslora='false'"),
}


def random_change(rng):
    """A change of an adapter's tensors and config; most of what it leaves is no adapter of the model."""

    def change(tensors, config):
        names = sorted(tensors)
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = rng.choice(names)
            if name in tensors:
                rng.choice(_DAMAGE)(rng, tensors, config, name)

    return change


def _resize(rng, tensors, config, name):
    tensor, dimension = tensors[name], rng.randrange(2)
    size = rng.choice([0, 1, tensor.shape[dimension] // 2, tensor.shape[dimension] - 1, 2 * tensor.shape[dimension]])
    tensors[name] = torch.ones((*tensor.shape[:dimension], size, *tensor.shape[dimension + 1 :]))


def _retype(rng, tensors, config, name):
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
    tensors[name] = tensors[name].to(rng.choice(kinds))


def _spoil_a_value(rng, tensors, config, name):
    values = tensors[name].float().flatten()
    values[rng.randrange(len(values)) : len(values)] = rng.choice([math.nan, math.inf, -math.inf, 1e38, 0.0, 1e-40])
    tensors[name] = values.view(tensors[name].shape)


def _rename(rng, tensors, config, name):
    pairs = [("layers.1.", "layers.2."), ("layers.1.", "layers.3."), ("layers.0.", "layers.00."), ("lora_A", "lora_B")]
    pairs += [
        ("base_model.model.", ""),
        ("model.layers", "layers"),
        (".weight", ".default.weight"),
        ("lora_B", "lora_C"),
    ]
    pairs += [("attention.dense", "attention.o_proj"), ("gate_proj", "up_proj"), ("mlp", "mlp.shared_experts")]
    old, new = rng.choice(pairs)
    for one in [name] if rng.random() < 0.5 else sorted(tensors):
        tensors[one.replace(old, new)] = tensors.pop(one)


def _drop(rng, tensors, config, name):
    module = name.rpartition(".lora_")[0]
    for one in [name] if rng.random() < 0.3 else [one for one in tensors if one.startswith(module)]:
        tensors.pop(one)


def _exchange(rng, tensors, config, name):
    other = rng.choice(sorted(tensors))
    tensors[name], tensors[other] = tensors[other], tensors[name]


def _turn(rng, tensors, config, name):
    tensors[name] = tensors[name].t()


def _scale(rng, tensors, config, name):
    tensors[name] = tensors[name].float() * rng.choice([-1, 0, 0.5, 3])


def _another_rank(rng, tensors, config, name):
    rank, module = rng.choice([1, 3, 8, 16, 17]), name.rpartition(".lora_")[0]
    draw = torch.Generator().manual_seed(rank)
    for one in [one for one in tensors if one.startswith(f"{module}.")]:
        rows, columns = tensors[one].shape
        shape = (rank, columns) if "lora_A" in one else (rows, rank)
        tensors[one] = 0.2 * torch.randn(shape, generator=draw)
    if rng.random() < 0.7:
        config["rank_pattern"] = {".".join(module.split(".")[-4:]): rank}


def _set_a_key(rng, tensors, config, name):
    module = re.escape(".".join(name.rpartition(".lora_")[0].split(".")[-2:]))
    keys = {
        "r": [1, 2, 8, 16, 64, 0, -1, None, "4", 4.0, True],
        "lora_alpha": [1, 4.5, -8, 0, None, "8", 1e40, math.nan, [8]],
        "use_rslora": [True, False, None, "yes", 1],
        "use_dora": [True, False, None, 0],
        "bias": ["none", "all", None, True, "lora_only"],
        "modules_to_save": [None, [], ["lm_head"], "lm_head"],
        "rank_pattern": [{}, None, {"dense": 2}, {module: 4}, {"(": 4}, [], {"dense": "4"}, {"dense": -1}],
        "alpha_pattern": [{}, None, {"dense": 2}, {module: 0.5}, {"*": 3}, 7, {"dense": None}],
        "target_modules": [[], None, "all-linear", ["dense"], ["nothing"], {"a": 1}],
        "layers_to_transform": [None, [1], 2],
        "peft_type": ["LORA", "lora", "LOHA", None, 3],
        "task_type": ["CAUSAL_LM", "SEQ_CLS", None],
        "fan_in_fan_out": [True, False, None],
        "init_lora_weights": [True, "gaussian", "pissa", None, 5],
        "base_model_name_or_path": ["", "another/model", None, 7],
        "lora_dropout": [0.3, 0, None],
        "something_new": [True, {"a": [1]}],
    }
    key = rng.choice(sorted(keys))
    config[key] = rng.choice(keys[key])


_DAMAGE = (_resize, _retype, _spoil_a_value, _rename, _drop, _exchange, _turn, _scale, _another_rank)
_DAMAGE += (_set_a_key, _set_a_key, _set_a_key)


def merged_tensors(tensors, adapter):
    """Weights with the adapter's products added, by PEFT's definition and with no check but PyTorch's.

    Raises:
        Exception: If it is no adapter of them: of whatever kind comes first.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (
        str(config.get("peft_type") or "LORA").upper() == "LORA"
        and not config.get("use_dora")
        and not config.get("fan_in_fan_out")
    )
    stored, tensors = read_tensors(adapter), dict(tensors)
    changes = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    assert 0 < len(changes) == len(stored)
    while changes:
        name = next(iter(changes))
        module, _, _ = name.rpartition(".lora_")
        a, b = (changes.pop(f"{module}.lora_{letter}.weight") for letter in "AB")
        assert a.is_floating_point() and b.is_floating_point()
        product = scale_in_peft(config, module) * (b.float() @ a.float())
        assert product.shape == tensors[f"{module}.weight"].shape and product.isfinite().all()
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + product
    return tensors


def adapted(model, batch, max_tokens=16, logprobs=True, **options):
    """`engine.ask` for each (prompt, adapter folder or None), and the counters."""
    from vllm.lora.request import LoRARequest

    folders = sorted({str(adapter) for _, adapter in batch if adapter})
    defaults = {"enable_lora": True, "max_loras": max(len(folders), 1), "disable_log_stats": False}
    llm = make_llm(model, **{**defaults, **options})
    known = {folder: LoRARequest(f"adapter-{i}", i + 1, folder) for i, folder in enumerate(folders)}
    adapters = [known[str(adapter)] if adapter else None for _, adapter in batch]
    return ask(llm, [prompt for prompt, _ in batch], max_tokens, logprobs, adapters), counters(llm)
