"""Recorded outputs of the official code.

tests/data/reference/README.md says what the recorded outputs hold.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.support.paths import DATA

REFERENCE = DATA / "reference"
CASES = sorted(path.name for path in REFERENCE.iterdir() if path.is_dir())


def load_case(case: str) -> tuple[Path, dict[str, Tensor]]:
    """Folder of the checkpoint, and the recorded tensors by name."""
    return REFERENCE / case / "model", load_file(REFERENCE / case / "expected.safetensors")
