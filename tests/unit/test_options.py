"""Keys of `--additional-config`."""

from types import SimpleNamespace

import pytest

from vllm_bailing.errors import SettingsError
from vllm_bailing.plugin.checks import check_sequence_parallel
from vllm_bailing.plugin.options import check_switches

KEYS = (
    "bailing_draft_vocab",
    "bailing_fp32_router",
    "bailing_fused_qk_norm_rope",
    "bailing_cpu_kernels",
    "bailing_sequence_parallel",
)


def check(**given):
    check_switches(SimpleNamespace(additional_config=given))


@pytest.mark.parametrize("key", KEYS)
def test_a_slip_of_the_pen_is_refused_and_the_key_that_was_meant_is_named(key):
    slips = {key[:-1], f"{key}s", key.replace("_", "-"), key.upper(), f"{key[:10]}{key[11]}{key[10]}{key[12:]}"}
    for slip in slips - {key}:
        with pytest.raises(SettingsError, match=f"'{slip}' in --additional-config .* did you mean {key}\\?"):
            check(**{slip: True})


def test_a_key_that_resembles_none_is_refused_with_the_list():
    with pytest.raises(SettingsError, match=f"'bailing' .* there are {', '.join(KEYS)}"):
        check(bailing={"fp32_router": True})


def test_keys_of_others_are_left_to_them():
    check(expert_map_path="x", torchair_graph_config={"enabled": True}, bailing_fp32_router=True)
    check_switches(SimpleNamespace(additional_config=None))


@pytest.mark.parametrize("key", [key for key in KEYS if key != "bailing_draft_vocab"])
@pytest.mark.parametrize("value", ["true", "yes", 1, 0, 2, [], {}, "x" * 9000, "\x1b[2J", float("nan")])
def test_a_switch_is_true_or_false(key, value):
    with pytest.raises(SettingsError, match="must be true or false") as refusal:
        check(**{key: value})
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 400


def divided(is_divided=True, use_bias=False, **given):
    return SimpleNamespace(
        additional_config=given,
        parallel_config=SimpleNamespace(use_sequence_parallel_moe=is_divided),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(use_bias=use_bias)),
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (divided(False, bailing_sequence_parallel=True), "--data-parallel-size above 1"),
        (divided(True, True, bailing_sequence_parallel=True), "use_bias in config.json"),
    ],
    ids=["tokens are not divided", "biases"],
)
def test_sequence_parallelism_that_is_not_there_cannot_be_kept(config, reason):
    with pytest.raises(SettingsError, match=f"^bailing_sequence_parallel=true in .*{reason}.*; leave it out$"):
        check_sequence_parallel(config)


def test_sequence_parallelism_is_kept_where_it_is_and_left_alone_where_nobody_asks():
    check_sequence_parallel(divided(bailing_sequence_parallel=True))
    check_sequence_parallel(divided(False))
    check_sequence_parallel(divided(False, bailing_sequence_parallel=False))
