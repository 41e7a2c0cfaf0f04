"""The BailingMoeV2 configuration: fields, defaults, derived sizes and validation.

Imports neither torch nor vLLM. Every default lives here, so no other file guesses a missing key.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from vllm_bailing.errors import OtherModelError, shown, told
from vllm_bailing.folders import nowhere, only_from_cache, without_config
from vllm_bailing.rope import ROPE_KEYS, settled_rope, with_original_window
from vllm_bailing.validation import (
    LARGEST,
    require_int,
    require_number,
    require_object,
    require_one_of,
    require_quantization,
    require_token_ids,
)

ARCHITECTURE = "BailingMoeV2ForCausalLM"
# The family: the causal language model, and the classes that trainers and embedding models name.
FAMILY = (
    ARCHITECTURE,
    *(f"BailingMoeV2{rest}" for rest in ("Model", "ForSequenceClassification", "ForTokenClassification")),
    *(f"BailingMoeV2{rest}" for rest in ("ForRewardModel", "ForRewardModeling", "RewardModel", "EmbeddingModel")),
)
MODEL_TYPE = "bailing_moe_v2"
# What the vendor's converter writes. First-generation Bailing models share it, so it never identifies this family.
SHARED_MODEL_TYPE = "bailing_moe"
# Keys that the official class of this family always writes and that of the first generation does not know.
_SECOND_GENERATION = ("n_group", "topk_group", "routed_scaling_factor", "moe_router_enable_expert_bias")

_SIZES = (  # positive integers
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "moe_intermediate_size",
)
_COUNTS = ("num_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")  # zero or more
_SWITCHES = tuple(
    "tie_word_embeddings use_bias use_qkv_bias use_qk_norm use_rmsnorm norm_topk_prob norm_head "
    "moe_router_enable_expert_bias dequantize".split()
)
_DROPOUTS = ("embedding_dropout", "attention_dropout", "output_dropout")
_NUMBERS = ("rms_norm_eps", "routed_scaling_factor")  # finite, above zero
_NULL_IS_DEFAULT = (*_SWITCHES, *_DROPOUTS, "initializer_range", "score_function", "router_dtype")
_NULL_IS_DEFAULT += ("num_nextn_predict_layers",)
_MOST_LABELS = 2**20
# Far beyond any model, and small enough for the lists that are made of them: layers, names of tensors, the
# rotation of every position.
_LARGEST = {
    "num_hidden_layers": 2**10,
    "num_nextn_predict_layers": 2**6,
    "num_experts": 2**12,
    "head_dim": 2**13,
    "max_position_embeddings": 2**24,
}
_MOST_EXPERTS = 2**17  # of all layers
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Keys beside those of the architecture: what the files are, and what the model is used for. None changes a layer.
_COMMON = frozenset(
    "model_type transformers_version dtype torch_dtype quantization_config stored_quantization_config bos_token_id "
    "mtp_target "  # of a trained MTP layer, see draft_target.py
    "name_or_path _name_or_path return_dict output_hidden_states output_attentions chunk_size_feed_forward n_predict "
    # classifiers, rerankers and embeddings
    "id2label label2id num_labels problem_type head_dtype sentence_transformers matryoshka_dimensions is_matryoshka "
    "use_sep_token use_pad_token classifier_from_token method "
    # in the published files, for training alone
    "max_window_layers norm_softmax output_router_logits mtp_loss_scaling_factor use_sliding_window".split()
)
# Keys that would make another model of this one, with the values (beside null) that leave it as it is.
_ANOTHER_MODEL: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "router_type": ("topN",),
    "mrope_section": (),
    "per_layer_config": ({},),
}
# Keys whose official default no published checkpoint has, and whose loss the tensors do not show.
_PUBLISHED = {"partial_rotary_factor": (1.0, 0.5), "routed_scaling_factor": (1.0, 2.5)}

_log = logging.getLogger("vllm.plugins.bailing")


class BailingMoeV2Config(PretrainedConfig):
    """Configuration of a BailingMoeV2 model (Ling-mini/flash-2.0, Ling-1T, their base and Ring siblings).

    Keys that a config.json leaves out take the meaning of the official modeling code: weights of the chosen experts
    are normalized, scores are sigmoids, routing runs in fp32, norms are RMSNorm, and the rotary width follows
    `partial_rotary_factor`, else `rotary_dim`, else the whole head. A switch that is null counts as left out.

    Keys of other architectures have no effect, as in the official code: `adopt` takes them out before anyone sees
    them. Those that would make another model of this one are refused, and so is any key that `update` does not know.

    Derived on construction, and again whenever a rope key is assigned (vLLM's `--hf-overrides` assigns attributes):

    - `rotary_dim` (channels) and `partial_rotary_factor` (share of `head_dim`), always consistent with each other;
    - `rope_parameters`: dict with `rope_type`, `rope_theta`, `partial_rotary_factor` and the scaling keys;
    - `max_position_embeddings` (tokens): with YaRN at least `factor * original_max_position_embeddings`, which is
      what the model card's recipe means although it leaves the window at 32768.

    With `dequantize` (a key of this class, not of the official one) `quantization_config` becomes
    `stored_quantization_config`, so that nobody takes the model for a quantized one; see `dequantize.py`.

    Raises:
        ValueError: If a value has the wrong type or range, or keys contradict each other; one line with their values.

    Source: inclusionAI/Ling-V2, `configuration_bailing_moe_v2.py` and `modeling_bailing_moe_v2.py`; model card of
    Ling-flash-2.0 for YaRN.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]
    # transformers would warn that a plain rope does not know this key, which the partial rotary needs.
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}
    __eq__ = PretrainedConfig.__eq__  # or transformers has dataclass fields compared: none here, so all are equal

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_qkv_bias: bool = False,
        use_bias: bool = False,
        use_qk_norm: bool = True,
        use_rmsnorm: bool = True,
        tie_word_embeddings: bool = False,
        norm_head: bool = False,
        rope_theta: float | None = None,
        partial_rotary_factor: float | None = None,
        rotary_dim: int | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        num_experts: int = 256,
        num_experts_per_tok: int = 8,
        n_group: int | None = 8,
        topk_group: int | None = 4,
        num_shared_experts: int | None = 1,
        moe_intermediate_size: int = 512,
        moe_shared_expert_intermediate_size: int | None = None,
        first_k_dense_replace: int = 1,
        routed_scaling_factor: float = 1.0,
        norm_topk_prob: bool = True,
        score_function: str | None = "sigmoid",
        router_dtype: str | None = "fp32",
        moe_router_enable_expert_bias: bool = True,
        num_nextn_predict_layers: int | None = 0,
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        output_dropout: float = 0.0,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        architectures: list[str] | None = None,
        dequantize: bool = False,
        **kwargs: Any,
    ) -> None:
        self.stored_quantization_config: dict[str, Any] | None = kwargs.pop("stored_quantization_config", None)
        self.dequantize = dequantize
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        if head_dim is None:
            require_int("hidden_size", hidden_size, 1)
            require_int("num_attention_heads", num_attention_heads, 1)
            head_dim = hidden_size // num_attention_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_qkv_bias = use_qkv_bias
        self.use_bias = use_bias
        self.use_qk_norm = use_qk_norm
        self.use_rmsnorm = use_rmsnorm
        self.norm_head = norm_head
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = 1 if n_group is None else n_group
        self.topk_group = self.n_group if topk_group is None else topk_group
        self.num_shared_experts = 0 if num_shared_experts is None else num_shared_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.moe_shared_expert_intermediate_size = (
            moe_intermediate_size
            if moe_shared_expert_intermediate_size is None
            else moe_shared_expert_intermediate_size
        )
        self.first_k_dense_replace = first_k_dense_replace
        self.routed_scaling_factor = routed_scaling_factor
        self.norm_topk_prob = norm_topk_prob
        self.score_function = score_function
        self.router_dtype = router_dtype
        self.moe_router_enable_expert_bias = moe_router_enable_expert_bias
        self.num_nextn_predict_layers = num_nextn_predict_layers
        self.embedding_dropout = embedding_dropout
        self.attention_dropout = attention_dropout
        self.output_dropout = output_dropout
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._check_fields()
        self._check_common_fields(architectures, kwargs)
        try:
            super().__init__(architectures=architectures or [ARCHITECTURE], **kwargs)
        except Exception as error:  # of any type, and seldom naming the key
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"transformers refuses one of the keys {', '.join(sorted(kwargs))}: {reason}") from error
        self.tie_word_embeddings = tie_word_embeddings
        self._set_rope(
            rope_parameters, rope_scaling, rope_theta, partial_rotary_factor, rotary_dim, self.max_position_embeddings
        )

    def __setattr__(self, key: str, value: Any) -> None:
        """Assign `key`; a rope key assigned after construction settles the other rope keys anew."""
        if value is None and key in _NULL_IS_DEFAULT:
            value = _PARAMETERS[key].default
        if key == "quantization_config":
            require_quantization(value)
        if isinstance(value, dict) and "rope_parameters" in self.__dict__ and not hasattr(type(self), key):
            _require_known(key, value)  # vLLM assigns overrides that are objects one by one
        if key == "dequantize" and value:
            self.stored_quantization_config = self.__dict__.pop("quantization_config", self.stored_quantization_config)
        elif key == "quantization_config" and self.dequantize:
            key = "stored_quantization_config"
        elif key in ("sliding_window", "attention_chunk_size"):
            value = None  # transformers' caches would take it for one in use, whatever `use_sliding_window` says
        if key not in ROPE_KEYS or "rope_parameters" not in self.__dict__:
            super().__setattr__(key, value)
            return
        current = dict(self.rope_parameters)
        window = self.max_position_embeddings
        if key in ("rope_parameters", "rope_scaling"):
            require_object(key, value)
            new = {name: given for name, given in (value or {}).items() if given is not None}
            # A new scaling starts from the window that the checkpoint was trained with, not from the stretched one.
            window = current.get("original_max_position_embeddings", window)
            theta = new.get("rope_theta", current["rope_theta"])
            factor = new.get("partial_rotary_factor", self.partial_rotary_factor)
            self._set_rope(new, None, theta, factor, None, window)
            return
        current.pop("partial_rotary_factor", None)
        theta = value if key == "rope_theta" else current.pop("rope_theta")
        current.pop("rope_theta", None)
        factor = value if key == "partial_rotary_factor" else None
        width = value if key == "rotary_dim" else (None if factor is not None else self.rotary_dim)
        self._set_rope(current, None, theta, factor, width, window)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Assign several keys, as `--hf-overrides` does; one that the architecture does not have is refused.

        Raises:
            ValueError: Naming the key, and the one that was probably meant.
        """
        for key, value in config_dict.items():
            _require_known(key, value)
        super().update({key: value for key, value in config_dict.items() if key in KEYS})

    # ---- rope -------------------------------------------------------------------------------------------------

    def standardize_rope_params(self) -> None:
        """Nothing to do: construction and assignment keep the rope keys settled. transformers and vLLM call this."""

    def validate_rope(self, *args: Any, **kwargs: Any) -> None:
        """Check the whole configuration again; vLLM calls this after `--hf-overrides` were applied."""
        if "rope_parameters" in self.__dict__:
            self._check_fields()

    def _set_rope(
        self,
        rope_parameters: dict[str, Any] | None,
        rope_scaling: dict[str, Any] | None,
        rope_theta: float | None,
        partial_rotary_factor: float | None,
        rotary_dim: int | None,
        window: int,
    ) -> None:
        given = rope_parameters, rope_scaling, rope_theta, partial_rotary_factor, rotary_dim, window
        # Past __setattr__, which takes the presence of rope_parameters as the mark of a complete object.
        self.__dict__.update(settled_rope(self.head_dim, *given))

    # ---- checks -----------------------------------------------------------------------------------------------

    def _check_fields(self) -> None:
        for name in _SIZES:
            require_int(name, getattr(self, name), 1, _LARGEST.get(name, LARGEST))
        for name in _COUNTS:
            require_int(name, getattr(self, name), 0, _LARGEST.get(name, LARGEST))
        if self.num_hidden_layers * self.num_experts > _MOST_EXPERTS:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} with num_experts={self.num_experts} are more than "
                f"{_MOST_EXPERTS} experts, and no model has so many; correct config.json"
            )
        shared = 1 if self.num_shared_experts else 0
        require_int("moe_shared_expert_intermediate_size", self.moe_shared_expert_intermediate_size, shared)
        for name in ("eos_token_id", "bos_token_id"):
            require_token_ids(name, getattr(self, name, None), self.vocab_size)
        require_token_ids("pad_token_id", None if self.pad_token_id == -1 else self.pad_token_id, self.vocab_size)
        for name in _NUMBERS:
            require_number(name, getattr(self, name))
        require_number("initializer_range", self.initializer_range, or_zero=True)
        for name in _DROPOUTS:
            require_number(name, getattr(self, name), or_zero=True, largest=1)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={told(getattr(self, name))} must be true or false; correct it in config.json")

        require_one_of("hidden_act", self.hidden_act, ("silu",))
        require_one_of("score_function", self.score_function, ("sigmoid",))
        # Routing is fp32 whatever is written here, as in the official code.
        require_one_of("router_dtype", self.router_dtype, ("fp32", "float32", "bf16", "bfloat16"))
        require_one_of("use_rmsnorm", self.use_rmsnorm, (True,))
        require_one_of("norm_topk_prob", self.norm_topk_prob, (True,))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} must divide num_experts={self.num_experts}")
        experts_per_group = self.num_experts // self.n_group
        if self.n_group > 1 and experts_per_group < 2:
            raise ValueError(
                f"n_group={self.n_group} leaves {experts_per_group} of num_experts={self.num_experts} to a group; "
                "a group is ranked by its two best experts"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if self.num_experts_per_tok > self.topk_group * experts_per_group:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.topk_group * experts_per_group} "
                f"experts that topk_group={self.topk_group} of n_group={self.n_group} groups hold "
                f"(num_experts={self.num_experts})"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} exceeds num_hidden_layers={self.num_hidden_layers}"
            )
        if self.norm_head and self.tie_word_embeddings:
            raise ValueError("norm_head=True contradicts tie_word_embeddings=True, since it would change the embedding")

    def _check_common_fields(self, architectures: Any, common: dict[str, Any]) -> None:
        """Check the keys of all models, where transformers or vLLM would end in an error that names no key."""
        for name in common:
            if _is_attribute_of_class(name):
                raise ValueError(f"{name}={told(common[name])} is not a key but a method or derived size; remove it")
        names = architectures or [ARCHITECTURE]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures={told(architectures)} must be a list such as ['{ARCHITECTURE}']")
        for name in ("dtype", "torch_dtype"):
            if isinstance(common.get(name), (str, bool, int, float, list, dict)):  # not yet a torch.dtype
                require_one_of(name, common[name], _DTYPES)
        require_quantization(common.get("quantization_config"))
        if common.get("num_labels") is not None:  # transformers makes a table of them
            require_int("num_labels", common["num_labels"], 0, _MOST_LABELS)
        require_token_ids("bos_token_id", common.get("bos_token_id"), self.vocab_size)
        _refuse_another_model(common)

    # ---- derived sizes ----------------------------------------------------------------------------------------

    @property
    def shared_expert_intermediate_size(self) -> int:
        """Width of all shared experts together; they are stored as one MLP."""
        routed_like = self.moe_intermediate_size * self.num_shared_experts
        # Some configs write the width of all shared experts into the key that elsewhere means the width of one.
        if self.moe_shared_expert_intermediate_size == routed_like:
            return routed_like
        return self.moe_shared_expert_intermediate_size * self.num_shared_experts

    @property
    def moe_layer_ids(self) -> list[int]:
        """Absolute indices of the MoE layers, MTP layers excluded."""
        return list(range(self.first_k_dense_replace, self.num_hidden_layers))

    @property
    def mtp_layer_ids(self) -> list[int]:
        """Absolute indices of the MTP layers, which follow the main ones in the checkpoint."""
        return list(range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers))


_PARAMETERS = inspect.signature(BailingMoeV2Config).parameters
KEYS = frozenset(_PARAMETERS) - {"kwargs"} | _COMMON


def _is_neutral(value: Any) -> bool:
    """Whether a key with this value says no more than if it were left out."""
    return value is None or value in (False, 0, "", [], {})


def _makes_another_model(key: str, value: Any) -> bool:
    if key == "layer_types" and value is not None:
        return not isinstance(value, list) or any(layer != "full_attention" for layer in value)
    return key in _ANOTHER_MODEL and value is not None and value not in _ANOTHER_MODEL[key]


def _refuse_another_model(keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if _makes_another_model(key, value):
            neutral = [json.dumps(value) for value in _ANOTHER_MODEL.get(key, ())]
            what = f"set it to {neutral[0]} or remove it" if neutral else "remove it"
            raise ValueError(f"{key}={told(value)} is not part of BailingMoeV2; {what} in config.json")


def _require_known(key: str, value: Any) -> None:
    """Refuse an assignment that the architecture has no use for; one that says nothing may stand."""
    _refuse_another_model({key: value})
    if key in KEYS or key in (*_ANOTHER_MODEL, "layer_types") or _is_neutral(value):
        return
    near = _nearest(key)
    meant = f"write {near} if that is meant, or leave it out" if near else "leave it out"
    raise ValueError(f"{shown(key)}={told(value)} is not a key of BailingMoeV2; {meant}")


def _is_attribute_of_class(key: str) -> bool:
    """Whether `key` is a method or derived size of the class, which no key can be assigned to."""
    attribute = getattr(BailingMoeV2Config, key, None)
    return callable(attribute) or (isinstance(attribute, property) and attribute.fset is None)


def is_bailing_moe_v2(architectures: Any) -> bool:
    """Whether the `architectures` value of a config.json names this family."""
    names = [architectures] if isinstance(architectures, str) else architectures
    return isinstance(names, (list, tuple)) and any(name in FAMILY for name in names)


def _describes_this_family(config_dict: dict[str, Any]) -> bool:
    """Whether the contents of a config.json are of this family, by its architectures or, without them, its keys.

    Raises:
        ValueError: If there are no architectures, and the keys fit neither generation.
    """
    architectures, model_type = config_dict.get("architectures"), config_dict.get("model_type")
    if architectures:
        return is_bailing_moe_v2(architectures) and model_type in (SHARED_MODEL_TYPE, MODEL_TYPE, None)
    if model_type != SHARED_MODEL_TYPE:
        return model_type == MODEL_TYPE
    missing = [key for key in _SECOND_GENERATION if config_dict.get(key) is None]
    if missing and len(missing) < len(_SECOND_GENERATION):
        raise ValueError(
            f"model_type={told(model_type)} means two architectures, and config.json has neither architectures nor "
            f'{", ".join(missing)} to tell them apart; write "architectures": ["{ARCHITECTURE}"] into it'
        )
    return not missing


def adopt(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The raw contents of a config.json as this class takes them, if they describe a model of this family.

    `model_type` becomes the family's own, since "bailing_moe" is shared with first-generation models, and `auto_map`
    goes, so that neither transformers nor vLLM ever fetches or runs the code it names. So do all keys that the
    architecture does not have: vLLM would read some of them, such as `sliding_window`, where the official code does
    not. Others come back untouched.

    Raises:
        ValueError: If no one can tell which architecture is meant, or two spellings of a key contradict each other.
    """
    if not isinstance(config_dict, dict) or not _describes_this_family(config_dict):
        return config_dict
    adopted = {**with_original_window(config_dict), "model_type": MODEL_TYPE}
    compression = adopted.pop("compression_config", None) or None  # the former name
    stored = adopted.pop("quantization_config", None) or None
    require_quantization(compression, "compression_config")
    if compression and stored and compression != stored:
        raise ValueError("compression_config contradicts quantization_config in config.json; keep the latter")
    if stored or compression:
        adopted["quantization_config"] = stored or compression
    dtype, former = adopted.get("dtype"), adopted.get("torch_dtype")
    if dtype and former and dtype != former:  # only here: a caller's `dtype` may stand beside the file's
        raise ValueError(f"dtype={told(dtype)} contradicts torch_dtype={told(former)}; keep one of them")
    _warn_of_lost_keys(adopted)
    known = {
        key: value
        for key, value in adopted.items()
        if key in KEYS or _makes_another_model(key, value) or _is_attribute_of_class(key)  # the class says no to these
    }
    foreign = adopted.keys() - known.keys() - {"auto_map"}
    without_effect = [key for key in sorted(foreign) if not key.startswith("_") and not _is_neutral(adopted[key])]
    if without_effect:
        named = ", ".join(f"{shown(key)}={told(adopted[key])}{_meant(key, adopted)}" for key in without_effect)
        _warn(f"config.json: without effect, since BailingMoeV2 does not have such keys: {named}")
    return known


def _meant(key: str, given: dict[str, Any]) -> str:
    near = _nearest(key, given)
    return f" (is {near} meant?)" if near else ""


def _nearest(key: str, besides: Collection[str] = ()) -> str:
    """The key that a slip of the pen made into `key`, if there is one `besides` those."""
    keys = sorted(KEYS - _ANOTHER_MODEL.keys() - set(besides))
    return next(iter(difflib.get_close_matches(key, keys, 1, cutoff=0.8)), "")


def _warn_of_lost_keys(raw: dict[str, Any]) -> None:
    inner = raw.get("rope_parameters")
    given = {**(inner if isinstance(inner, dict) else {}), **{key: raw[key] for key in raw if raw[key] is not None}}
    for key, (default, published) in _PUBLISHED.items():
        if given.get(key) is None and not (key == "partial_rotary_factor" and given.get("rotary_dim") is not None):
            _warn(
                f"config.json has no {key}: its official default is {default}, while the published checkpoints of "
                f"this family have {published}; if it was lost, answers are wrong without an error: write it there"
            )


_heard: list[list[str]] = []  # of those who hear instead of the log


@contextlib.contextmanager
def warnings_heard() -> Iterator[list[str]]:
    """What is said of the config.json files that the body reads, which is not logged."""
    heard: list[str] = []
    _heard.append(heard)
    try:
        yield heard
    finally:
        _heard.remove(heard)


def _warn(message: str) -> None:
    if not _heard:
        _log_once(message)
    elif message not in _heard[-1]:
        _heard[-1].append(message)


@functools.cache  # loaders read a file several times
def _log_once(message: str) -> None:
    _log.warning(message)


def register_with_transformers() -> None:
    """Let `AutoConfig`, and so vLLM, read this family's config.json files. Safe to call again."""
    adopt_config_files()
    name_the_configuration()


def name_the_configuration() -> Callable[[], object]:
    """Let `AutoConfig` know this family's model type; returns what takes that back. Safe to call again."""
    from transformers import CONFIG_MAPPING, AutoConfig

    AutoConfig.register(MODEL_TYPE, BailingMoeV2Config, exist_ok=True)
    return lambda: CONFIG_MAPPING._extra_content.pop(MODEL_TYPE, None)


def adopt_config_files() -> Callable[[], object]:
    """Give every loader this family's config.json files under their own model type; returns what takes that back.

    transformers looks classes up by `model_type` alone, before anything reads `architectures`. The published files
    share theirs with first-generation Bailing, so the raw dict is adopted where all loaders get it.
    """
    original = PretrainedConfig.__dict__["get_config_dict"]
    if getattr(original.__func__, "_adopts_bailing_moe_v2", False):
        return lambda: None

    @functools.wraps(original.__func__)
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, unused_kwargs = original.__func__(cls, *args, **kwargs)
        return adopt(config_dict), unused_kwargs

    get_config_dict._adopts_bailing_moe_v2 = True  # type: ignore[attr-defined]
    PretrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[assignment]

    def undo() -> None:
        PretrainedConfig.get_config_dict = original

    return undo


def read_config(model: str | Path, overrides: dict[str, Any] | None = None) -> BailingMoeV2Config:
    """The configuration of a folder, a config.json or a hub name, with `--hf-overrides` applied as vLLM does.

    Raises:
        ValueError: If it cannot be had or is wrong, and as an `OtherModelError` if it is another architecture's.
    """
    from transformers import AutoConfig

    if reason := nowhere(str(model)) or without_config(Path(model)):
        raise ValueError(str(reason))
    where = {"local_files_only": only_from_cache(str(model))}
    register_with_transformers()
    try:
        raw, _ = PretrainedConfig.get_config_dict(str(model), **where)
        if not isinstance(raw, dict):
            raise TypeError(f"it holds a {type(raw).__name__}")
        if raw.get("model_type") != MODEL_TYPE:  # which `adopt` gave to the family's
            raise OtherModelError(
                f"{model} is not a BailingMoeV2 model: its config.json has model_type={told(raw.get('model_type'))} "
                f"and architectures={told(raw.get('architectures'))}, not {MODEL_TYPE!r} and ['{ARCHITECTURE}']"
            )
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=False, **where)
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{model} has no config.json that can be read: {shown(error)}") from None
    assert isinstance(config, BailingMoeV2Config)
    config.update(overrides or {})
    config.validate_rope()
    return config
