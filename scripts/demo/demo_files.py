"""What the scripts of this folder share: where files are, and how weights are written."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # vllm_bailing is the one beside these scripts, whose files they write
HELDOUT = ROOT / "tests" / "data" / "demo_heldout.jsonl"
NEEDLE = ROOT / "tests" / "data" / "needle"


def rounded(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as published: bfloat16, the expert biases in float32."""
    return {
        name: (tensor.float() if name.endswith("expert_bias") else tensor.bfloat16()).contiguous()
        for name, tensor in state_dict.items()
    }


def write_weights(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that all may read; safetensors itself lets only its owner."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)
