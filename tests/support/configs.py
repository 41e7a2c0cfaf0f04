"""Published config.json files, and values that might stand in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.paths import DATA
from vllm_bailing.config import BailingMoeV2Config, adopt

CONFIGS = DATA / "configs"
CARD = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}  # as the model card writes it
SPELLINGS = {
    "type": CARD,
    "rope_type": {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"},
    "both": {**CARD, "rope_type": "yarn"},
}


def raw_config_of(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, raw: dict[str, Any]) -> Path:
    """Write a config.json, and the folder for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def change_config(folder: Path, **keys: Any) -> None:
    """Change keys of config.json."""
    write_config(folder, {**raw_config_of(folder), **keys})


def published(name: str, **changes) -> dict:
    return {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}


def built(contents: dict) -> BailingMoeV2Config:
    return BailingMoeV2Config(**adopt(contents))


YARN = {"type": "yarn", "factor": 4.0}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([32768, 131072, 10**400]),
    st.floats(),
    st.sampled_from(["", "4", "yarn", "default", "linear", "sigmoid", "silu", "bfloat16", "a\nb"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
ROPE_KEYS = (
    "type rope_type factor original_max_position_embeddings rope_theta partial_rotary_factor attention_factor "
    "beta_fast beta_slow mscale truncate other"
).split()
ROPES = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS, max_size=4),
    st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS, max_size=4).map(lambda rope: {**rope, **YARN}),
)
