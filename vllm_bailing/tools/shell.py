"""Commands as they are shown, to be copied."""

from __future__ import annotations

from pathlib import Path


def servable(model: str) -> str:
    """What `vllm serve` takes for `model`: of a config.json its folder if weights lie in it, else "MODEL"."""
    file = Path(model)
    if not file.is_file():
        return f"./{model}" if model.startswith("-") else model
    is_model = file.name == "config.json" and any(file.parent.glob("*.safetensors"))
    return str(file.parent) if is_model else "MODEL"


def laid_out(parts: list[list[str]], columns: int) -> str:
    """A command whose quoted words come in `parts`, such as a flag with its value, on lines of so many columns.

    A part is on one line if it fits, and no word is broken.
    """
    width, lines = columns - 4, [""]  # with "  " before a line and " \\" after it
    for part in parts:
        whole = " ".join(part)
        for piece in [whole] if len(whole) <= width else part:
            if len(lines[-1]) + 1 + len(piece) > width and lines[-1]:
                lines.append("")
            lines[-1] += f" {piece}" if lines[-1] else piece
    return " \\\n  ".join(lines)
