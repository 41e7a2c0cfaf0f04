"""Write the configuration files of deploy/serve, one for each deployment of tests/data/deployments.json.

python scripts/dev/serve_configs.py
vllm serve --config deploy/serve/flash-4xH100.yaml
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_bailing.config import BailingMoeV2Config, adopt
from vllm_bailing.planning.plan import Plan, make_plan
from vllm_bailing.planning.request import Request

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "serve"


def _read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests" / "data" / name).read_text(encoding="utf-8"))


def zoo_config(name: str, **overrides: Any) -> BailingMoeV2Config:
    """Configuration of a checkpoint of zoo.json."""
    zoo = _read("zoo.json")
    entry = zoo["checkpoints"][name]
    raw = adopt({**zoo["common"], **zoo["sizes"][entry["size"]], **entry["config"], **overrides})
    return BailingMoeV2Config.from_dict(raw)


def plans() -> dict[str, Plan]:
    """Every deployment by its name."""
    by_name = {}
    for name, options in _read("deployments.json")["deployments"].items():
        checkpoint = options.pop("checkpoint")
        by_name[name] = make_plan(zoo_config(checkpoint), Request(model=f"inclusionAI/{checkpoint}", **options))
    return by_name


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, plan in plans().items():
        if not plan.fits:
            raise SystemExit(f"serve_configs: {name}: {plan.reason}")
        (FOLDER / f"{name}.yaml").write_text(plan.yaml(), encoding="utf-8")


if __name__ == "__main__":
    main()
