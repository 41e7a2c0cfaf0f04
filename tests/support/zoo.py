"""The published checkpoints, as tests/data/zoo.json describes them."""

from __future__ import annotations

import json

from tests.support.paths import DATA

ZOO = json.loads((DATA / "zoo.json").read_text(encoding="utf-8"))
CHECKPOINTS, OTHERS = ZOO["checkpoints"], ZOO["others"]


def raw_config(name):
    entry = CHECKPOINTS[name]
    return {**ZOO["common"], **ZOO["sizes"][entry["size"]], **entry["config"]}
