"""Where a checkpoint is on this machine; what a folder is if it is none, and how to get one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vllm_bailing.errors import LET_READ, FilesError, Finding, shown
from vllm_bailing.json_files import read_json

_HUB_SECONDS = 10.0  # for one answer, to a name on the hub
_NO_OWNER = "names on the hub are OWNER/MODEL, and the demo's folder is what `vllm-bailing demo-path` prints"
FileStates = tuple[tuple[str, int, int], ...]  # name, size in bytes, time of the last change in ns


def states_of(folder: Path, pattern: str) -> FileStates:
    """The files of a folder that match `pattern`: whoever keeps what it read of them reads again when this changes.

    A link to nowhere has size and time -1.
    """

    def state(file: Path) -> tuple[str, int, int]:
        try:
            found = file.stat()
        except OSError:
            return file.name, -1, -1
        return file.name, found.st_size, found.st_mtime_ns

    return tuple(sorted(map(state, folder.glob(pattern))))


def local_folder(model: str) -> Path:
    """The folder of a checkpoint that is on this machine.

    Raises:
        FilesError: If it is not.
    """
    if Path(model).is_dir():
        return Path(model).resolve()
    if Path(model).exists():
        raise FilesError(Finding(f"{model} is a file", "give the folder that it is in"))
    if is_path(model):
        todo = "correct it, or give a model's name on the hub"
        raise FilesError(Finding(f"{model} is no folder on this machine", todo))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        todo = _NO_OWNER if "/" not in model else f"fetch it by `hf download {model}`"
        raise FilesError(Finding(f"{model} is neither a folder nor a model that was downloaded", todo)) from None


def is_closed(path: str) -> bool:
    """Whether it is a folder that this process may not look into."""
    try:
        return Path(path).is_dir() and not os.access(path, os.R_OK | os.X_OK)
    except (OSError, ValueError):  # it lies in one, or is no path at all
        return False


def is_path(model: str) -> bool:
    """Whether `model` can only be a path: names on the hub have at most one slash, and no dot before it."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists()


def nowhere(model: str) -> str | None:
    """Why a path cannot be read if nothing is there; None if something is, or if it may be a name on the hub."""
    if not is_path(model) or Path(model).exists():
        return None
    return f"{model} is no folder and no file on this machine; correct it, or give a model's name on the hub"


def only_from_cache(model: str) -> bool:
    """Whether the files of a name on the hub can come from this machine's cache alone, since the hub does not answer.

    It is asked once: the hub's client would try five times, and print each.

    Raises:
        ValueError: If config.json is not in the cache either.
    """
    if is_path(model):
        return False
    from huggingface_hub import constants, get_session, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
        return False
    except Exception as error:  # requests', httpx's or httpx2's: the hub's releases have one each
        reason = shown(error) or type(error).__name__
    if constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set"
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return True
    except HFValidationError:
        raise ValueError(f"{shown(model)} is no folder, and no name that the hub allows; correct it") from None
    if "/" not in model:
        raise FilesError(Finding(f"{model} is no folder here and was not downloaded", _NO_OWNER))
    raise ValueError(
        f"{model} is no folder here and was not downloaded, and {constants.ENDPOINT} cannot be asked ({reason}); give "
        "a folder or a config.json, or set HF_ENDPOINT or HTTPS_PROXY to what can be reached"
    )


def how_to_fetch(model: str) -> str:
    """The command that fetches `model`; advice for a folder of which nobody knows where it comes from."""
    if not is_path(model):
        return f"hf download {model}"
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", f"{model}/")
    return f"hf download {cached[1]}/{cached[2]}" if cached else "copy, fetch or export it again"


def without_config(folder: Path) -> Finding | None:
    """What a folder without a config.json is, or with none that is JSON, and what to do; None for any other path."""
    file = folder / "config.json"
    if not folder.is_dir():
        return None
    if file.is_file():
        try:
            read_json(file)
        except ValueError as error:
            remedy = LET_READ if isinstance(error.__context__, PermissionError) else how_to_fetch(str(folder))
            return Finding(f"{folder} has no config.json that can be read: it {error}", remedy)
        return None
    if file.is_symlink():
        return Finding(f"{file} links to {shown(str(file.readlink()))}, which is gone", how_to_fetch(str(folder)))
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        todo = f"name its base model here, and serve the adapter with --enable-lora --lora-modules NAME={folder}"
        return Finding(f"{folder} is a LoRA adapter", todo)
    if any(name.endswith(".gguf") for name in names):
        return Finding(f"{folder} has GGUF files, llama.cpp's", "give a folder with config.json and safetensors files")
    if not names:
        return Finding(f"{folder} is empty", how_to_fetch(str(folder)))
    inner = [name for name in names if (folder / name / "config.json").is_file()]
    hint = f"is {folder / inner[0]} meant?" if inner else how_to_fetch(str(folder))
    return Finding(f"{folder} has no config.json", hint)


def endless_file(folder: Path) -> str | None:
    """What to say of a pipe or device among the files of a folder, which a library would wait for; None if none."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.exists() and not file.is_file() and not file.is_dir():
            return f"{shown(str(file))} is a pipe or a device and no file"
    return None
