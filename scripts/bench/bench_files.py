"""What the scripts of this folder share: where files are, and random checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # vllm_bailing is the one beside these scripts


def random_checkpoint(folder: Path, config: dict[str, Any]) -> float:
    """Write a random bf16 checkpoint with this configuration; returns its parameters in millions."""
    import torch

    from vllm_bailing.config import BailingMoeV2Config
    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    torch.manual_seed(0)
    model = BailingMoeV2ForCausalLM(BailingMoeV2Config(**config)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
