"""Keys of `--additional-config`."""

from types import SimpleNamespace

import pytest

from vllm_bailing.errors import SettingsError
from vllm_bailing.plugin.options import check_switches

KEYS = ("bailing_draft_vocab", "bailing_fp32_router", "bailing_fused_qk_norm_rope", "bailing_cpu_kernels")


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
@pytest.mark.parametrize("value", ["true", "yes", 2, [], {}])
def test_a_switch_is_true_or_false(key, value):
    with pytest.raises(SettingsError, match="must be true or false"):
        check(**{key: value})
