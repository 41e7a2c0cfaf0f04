"""A way of transferring weights into vLLM that runs on a CPU: files, as vLLM's own ways need GPUs.

All else is vLLM's: its update session, its endpoints, its order of calls. A server learns of it by
`--worker-extension-cls tests.support.weight_files.Extension`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "files"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A safetensors file with some tensors under their published names."""

    file: str


class FileTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Does what vLLM's engine for GPUs of one machine (`ipc_engine.py`) does, with files in place of shared memory."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # no device to wait for

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(list(load_file(Path(update_info.file)).items()))

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: object, trainer_args: object) -> None:
        """vLLM 0.27 wants it in every such class; trainers here write files."""


class Extension:
    """Importing this module is all that it is for."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)
