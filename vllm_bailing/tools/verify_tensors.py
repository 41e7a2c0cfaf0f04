"""A checkpoint's tensors one by one, in fp32, for the reference that is read layer by layer."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.dequantize import Dequantizer
from vllm_bailing.errors import CheckpointError


class TensorReader:
    """A checkpoint's tensors one by one, in fp32, quantized ones as what they stand for.

    Raises:
        CheckpointError: If the files are damaged or do not fit the configuration.
    """

    def __init__(self, folder: Path, config: BailingMoeV2Config) -> None:
        self.folder, self.config, self.checkpoint = folder, config, Checkpoint(folder).published(config)
        if not self.checkpoint.tensors and not self.checkpoint.damage:
            raise CheckpointError(f"{folder} has no safetensors files; give the folder that the server was started on")
        stored = stored_quantization(config)
        Audit.of_target(config, quantized=stored is not None, folder=str(folder)).check(self.checkpoint)
        self._plain = None if stored is None else Dequantizer(stored, torch.float32)
        self._parts: dict[str, list[str]] = {}
        for name in self.checkpoint.tensors:
            self._parts.setdefault(name.rpartition(".")[0], []).append(name)
        self._open = contextlib.ExitStack()
        self._files: dict[Path, Any] = {}

    def close(self) -> None:
        """Let go of the files, whose pages would otherwise stay in memory."""
        self._open.close()
        self._files.clear()

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._files:
            self._files[path] = self._open.enter_context(safe_open(path, framework="pt"))
        return self._files[path]

    def tensor(self, name: str) -> Tensor:
        """`name` as a whole."""
        if name in self.checkpoint.tensors and self._plain is None:
            return self.checkpoint.tensors[name].read(self._file).float()
        parts = self._parts[name.rpartition(".")[0]]
        stored = [(part, self.checkpoint.tensors[part].read(self._file)) for part in parts]
        return dict(self._plain.plain(stored) if self._plain else stored)[name].float()

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of the matrix `name`; embedding and head are never quantized row-wise."""
        if name not in self.checkpoint.tensors or self.is_quantized(name):
            return self.tensor(name)[start:end]
        stored = self.checkpoint.tensors[name]
        return self._file(stored.file).get_slice(stored.name)[start : min(end, stored.shape[0])].float()

    def is_quantized(self, name: str) -> bool:
        """Whether the matrix `name` is stored quantized."""
        return self.checkpoint.has_scales(name.rpartition(".")[0])

    def fill(self, module: nn.Module, prefix: str) -> nn.Module:
        """`module`, made on the meta device, with the tensors that are called `prefix`.*."""
        state = {}
        for name, empty in module.state_dict().items():
            full = f"{prefix}.{name}"
            absent = name.endswith("expert_bias") and full not in self.checkpoint.tensors
            state[name] = torch.zeros(empty.shape) if absent else self.tensor(full)
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False)


def stored_quantization(config: BailingMoeV2Config) -> dict[str, Any] | None:
    """The `quantization_config` of the checkpoint's files, if they are quantized."""
    return config.stored_quantization_config or getattr(config, "quantization_config", None)
