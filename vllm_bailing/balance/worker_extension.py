"""Notes which experts the routers of a running model pick, in the processes that hold the model.

vLLM mixes `PicksExtension` into its workers where `worker_extension_cls` names it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vllm_bailing.tensor_names import layer_of

EXTENSION = "vllm_bailing.balance.worker_extension.PicksExtension"


class PicksExtension:
    """Methods for `LLM.collective_rpc`; their names must not be those of a worker's own."""

    get_model: Any
    _bailing_picks: dict[str, list[torch.Tensor]]

    def bailing_watch_routers(self) -> list[int]:
        """Note the picks of all layers from now on.

        Returns:
            Numbers of the layers that are watched. Not among them are those whose kernel picks by itself.
        """
        self._bailing_picks = {}
        for name, module in self.get_model().named_modules():
            layer, watch = layer_of(f"{name}."), getattr(getattr(module, "router", None), "set_capture_fn", None)
            is_monolithic = getattr(getattr(module, "_quant_method", None), "is_monolithic", False)
            if layer is not None and watch is not None and not is_monolithic:
                self._bailing_picks[str(layer)] = noted = []
                watch(partial(_note, noted))
        return [int(layer) for layer in self._bailing_picks]

    def bailing_take_picks(self) -> dict[str, bytes]:
        """What was noted since the last call: for each layer uint16 [tokens, K], as bytes."""
        taken = {}
        for layer, noted in self._bailing_picks.items():
            taken[layer] = b"".join(part.numpy().astype(np.uint16).tobytes() for part in noted)
            noted.clear()
        return taken


def _note(noted: list[torch.Tensor], picks: torch.Tensor) -> None:
    noted.append(picks.to("cpu", copy=True))
