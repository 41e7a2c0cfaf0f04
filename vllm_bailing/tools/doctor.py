"""Checks of an installation and of a checkpoint; each says what is there and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_bailing.errors import shown, unreadable
from vllm_bailing.tools.doctor_processor import kernels_for, processor, serves_on_cpu
from vllm_bailing.units import GIB

TRIED_SCHEMES = ("compressed-tensors", "fp8", "gptq", "awq")
GROUP, NAME = "vllm.general_plugins", "bailing"
_WORKER = f"""
import json
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import ModelRegistry
from vllm.platforms import current_platform as platform
from vllm_bailing.plugin import supported_versions
names = [*supported_versions.ARCHITECTURES, *supported_versions.DRAFT_ARCHITECTURES]
where = {{name: getattr(ModelRegistry.models.get(name), "module_name", "") for name in names}}
gpus = [platform.get_device_name(number) for number in range(platform.device_count())] if platform.is_cuda() else []
print("{NAME}:" + json.dumps({{"classes": where, "platform": platform.device_name, "gpus": gpus}}))
"""


@dataclass(frozen=True)
class Check:
    """A result. `ok` is None where there is nothing to judge; `fix` says what to do if it is False."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def environment() -> Iterator[Check]:
    """Checks of this machine that import nothing; see `Worker` for the others."""
    yield Check("python", sys.version_info >= (3, 10), sys.version.split()[0], "use Python 3.10 or newer")
    yield from _packages()
    yield _entry_point()
    yield _memory()
    yield _disk()
    yield from _engines_left_behind()


def _packages() -> Iterator[Check]:
    from vllm_bailing import __version__
    from vllm_bailing.plugin import supported_versions

    yield Check("vllm-bailing", True, __version__)
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        yield Check("vllm", False, "not installed", "pip install vllm, or for CPUs see scripts/setup.sh")
        return
    decision = supported_versions.decide(_vllm_version() or installed)
    first, last = supported_versions.CHECKED_VLLM
    if not decision.active:
        yield Check("vllm", False, f"{installed}: {decision.reason}", f"install vLLM {first} to {last}")
    elif decision.warning:
        yield Check("vllm", None, f"{installed}, newer than the checked {first} to {last}")
    else:
        yield Check("vllm", True, f"{installed} (checked: {first} to {last})")
    for package in ("torch", "transformers", "safetensors", "compressed-tensors"):
        try:
            yield Check(package, True, version(package))
        except PackageNotFoundError:
            yield Check(package, False, "not installed", f"pip install {package}")


def _vllm_version() -> str | None:
    """As vLLM's own file has it: importing vLLM takes longer than all other checks."""
    found = find_spec("vllm")
    file = Path(found.origin or "").with_name("_version.py") if found else None
    return runpy.run_path(str(file)).get("__version__") if file and file.is_file() else None


def _entry_point() -> Check:
    points = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not points:
        return Check("entry point", False, f"no {NAME!r} in {GROUP}", "pip install vllm-bailing into this environment")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        complete = ",".join([*filter(None, allowed.split(",")), NAME])
        return Check(
            "entry point", False, f"VLLM_PLUGINS={allowed!r} leaves {NAME!r} out", f"export VLLM_PLUGINS={complete}"
        )
    return Check("entry point", True, f"{NAME} = {points[0].value}")


class Worker:
    """A process as vLLM starts them. It imports vLLM, which takes long, while the caller goes on with other checks."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _WORKER]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def checks(self) -> Iterator[Check]:
        """What it found: GPUs or processor, and which classes it would use; waits for it."""
        output, errors = self._process.communicate()
        answers = [line for line in output.splitlines() if line.startswith(f"{NAME}:")]
        answer = json.loads(answers[0].partition(":")[2]) if answers else {}
        yield _accelerator(answer)
        if serves_on_cpu():
            yield Check("processor", None, processor())
        yield _worker(answer, (errors.strip().splitlines() or ["no output"])[-1])


def _worker(answer: dict[str, Any], problem: str) -> Check:
    if not answer:
        return Check(
            "a worker's classes", False, problem[:200], "run `python -c 'import vllm'` and fix what it reports"
        )
    where: dict[str, str] = answer["classes"]
    detail = ", ".join(f"{name} from {module.partition('.')[0] or 'nowhere'}" for name, module in where.items())
    if all(module.startswith("vllm_bailing") for module in where.values()):
        return Check("a worker's classes", True, detail)
    from vllm_bailing.plugin.supported_versions import USE_INTREE

    if os.environ.get(USE_INTREE, "0") not in ("", "0"):
        return Check("a worker's classes", None, f"{detail}, since {USE_INTREE} is set")
    return Check("a worker's classes", False, detail, "see the lines above: vLLM's version, or VLLM_PLUGINS")


def _accelerator(answer: dict[str, Any]) -> Check:
    """The GPUs that vLLM finds, through NVML; where it finds none, what the driver's tool says."""
    if answer.get("gpus"):
        kinds = Counter(answer["gpus"])
        return Check("GPU", True, ", ".join(f"{count} x {name}" for name, count in kinds.items()))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("GPU", None, f"none: vLLM runs on {answer.get('platform') or 'what its build is for'}")
    query = "name,driver_version,memory.total"
    done = subprocess.run([tool, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
        return Check("GPU", False, f"nvidia-smi: {last[0]}", "repair the driver until `nvidia-smi` lists the GPUs")
    rows = done.stdout.strip().splitlines()
    try:
        import torch

        if not torch.cuda.is_available():
            cuda = torch.version.cuda or "none"
            fix = "install vLLM's CUDA build: pip install vllm" if cuda == "none" else f"a driver for CUDA {cuda}"
            return Check("GPU", False, f"{rows[0]}, but torch (CUDA {cuda}) cannot use it", fix)
        detail = f"{len(rows)} x {rows[0]}, CUDA {torch.version.cuda}"
    except ImportError:
        detail = f"{len(rows)} x {rows[0]}"
    return Check("GPU", True, detail)


def _memory() -> Check:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Check("memory", None, f"{pages * size / GIB:.0f} GiB")


def _disk() -> Check:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except PermissionError as error:
        return Check("disk for models", False, *unreadable(error))
    return Check("disk for models", None, f"{shutil.disk_usage(existing).free / GIB:.0f} GiB free for {folder}")


def _engines_left_behind() -> Iterator[Check]:
    """Engines whose server was killed: they wait for it for ever, and keep the memory of the GPUs meanwhile."""
    import psutil

    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if not re.search(r"::EngineCor", process.info["name"] or ""):
                continue
            parent = process.parent()
            command = " ".join(parent.cmdline()) if parent else ""
            # Init, or what takes its place; whatever can start an engine is a program of Python's.
            if not re.search(r"python|vllm|ray", command, re.IGNORECASE):
                detail = f"{process.pid} runs without its server and keeps its memory; end it by: kill {process.pid}"
                yield Check("an engine", None, detail)


_TO_SAFETENSORS = "save the model as safetensors, which needs no pickle"


def checkpoint(model: str, overrides: dict[str, Any] | None = None) -> Iterator[Check]:
    """Checks of a checkpoint on this machine; reads configuration and headers, no weights."""
    from vllm_bailing.checkpoint import Checkpoint
    from vllm_bailing.config import read_config, warnings_heard
    from vllm_bailing.errors import LET_READ, FilesError, OtherModelError, named
    from vllm_bailing.folders import how_to_fetch, local_folder, without_config

    try:
        folder = local_folder(model)
    except FilesError as error:
        yield Check("files", False, *error.finding)
        return
    if reason := without_config(folder):
        yield Check("files", False, *reason)
        return
    try:
        with warnings_heard() as warnings:
            config = read_config(folder, overrides)
    except OtherModelError as error:
        yield Check("config.json", False, str(error), "nothing here is for it: vLLM serves it by its own class, if any")
        return
    except ValueError as error:
        try:
            read_config(folder)
        except ValueError:
            yield Check("config.json", False, str(error), "correct config.json, or fetch it again")
        else:
            detail = str(error).replace("correct it in config.json", "correct it")  # which is right
            yield Check("--hf-overrides", False, detail, "correct --hf-overrides, or leave it out")
        return
    scaling = config.rope_parameters["rope_type"]
    window = f"{config.max_position_embeddings} tokens" + (f" by {scaling}" if scaling != "default" else "")
    yield Check("config.json", True, f"{config.num_hidden_layers} layers, {config.num_experts} experts, {window}")
    for warning in warnings:
        yield Check("config.json", None, warning.removeprefix("config.json: "), "correct it if it is a mistake")

    as_stored = Checkpoint(folder)
    stored_files = as_stored.published(config)
    if stored_files.damage:
        todo = how_to_fetch(model) if as_stored.damage else "remove the tensor that you do not want"
        todo = LET_READ if stored_files.damage.endswith(LET_READ) else todo
        yield Check("files", False, stored_files.damage.removesuffix(f"; {LET_READ}"), todo)
        return
    if not stored_files.tensors and any(folder.glob("*.bin")):
        yield Check(
            "files",
            None,
            "PyTorch's .bin files, which nothing here reads: the weights were not checked",
            _TO_SAFETENSORS,
        )
        yield from _template(folder, config)
        return
    if not stored_files.tensors:
        yield Check("files", False, f"no safetensors files in {folder}", how_to_fetch(model))
        return
    files = {stored.file for stored in stored_files.tensors.values()}
    yield Check("files", True, f"{len(files)} of {_size(stored_files.size)}, {len(stored_files.tensors)} tensors")
    if names := as_stored.named_by_index_alone():
        detail = f"the index names what no file has: {named(names)}"
        yield Check("files", None, detail, "take index and files from the same export, unless you removed them")

    made_for = _draft_alone(config, stored_files)
    yield from _contents(config, stored_files, folder, made_for)
    if made_for is None:  # a draft has its target's tokenizer
        yield from _template(folder, config)


def _contents(config: Any, stored_files: Any, folder: Path, made_for: Check | None) -> Iterator[Check]:
    """Checks of the tensors, by their names, shapes and kinds; `made_for` is of `_draft_alone`."""
    from vllm_bailing.checkpoint_audit import Audit

    stored = config.stored_quantization_config or getattr(config, "quantization_config", None)
    scheme = _quantization(stored, {tensor.kind for tensor in stored_files.tensors.values()})
    yield scheme
    if serves_on_cpu() and stored and scheme.ok is not False:
        has_kernels, detail, fix = kernels_for(stored_files, scheme.detail)
        yield Check("kernels", has_kernels or None, detail, fix)  # dequantized it is served, so nothing is wrong
    if made_for:
        yield made_for
        yield from _audited(
            Audit.of_draft(config, quantized=bool(stored), folder=str(folder)), stored_files, "MTP layer"
        )
        return
    yield from _generation_config(folder, config.vocab_size)
    audit = Audit.of_target(config, quantized=bool(stored), folder=str(folder))
    yield from _audited(audit, stored_files, "tensors")

    layers = stored_files.layers_past_main(config)
    if any(f"model.layers.{number}.eh_proj.weight" not in stored_files.tensors for number in layers):
        return  # main layers that config.json does not count, of which the line above tells
    if len(layers) != config.num_nextn_predict_layers and layers:
        yield Check(
            "MTP layer",
            False,
            f"{len(layers)} in the files, num_nextn_predict_layers={config.num_nextn_predict_layers} in config.json",
            f"""pass --hf-overrides '{{"num_nextn_predict_layers": {len(layers)}}}'""",
        )
    elif not layers:
        yield Check("MTP layer", None, "none: speculation needs a checkpoint that has it as the draft")
    else:
        draft = Audit.of_draft(config, quantized=bool(stored), folder=str(folder))
        yield from _audited(draft, stored_files, "MTP layer")


def _draft_alone(config: Any, stored_files: Any) -> Check | None:
    """What a checkpoint of MTP layers alone is; None if it holds main layers too."""
    from vllm_bailing.draft_target import DraftTarget
    from vllm_bailing.tensor_names import layer_of

    layers = stored_files.layers_past_main(config)
    if not layers or any(layer_of(name) not in layers for name in stored_files.tensors):
        return None
    made_for = DraftTarget.named_in(config)
    detail = (
        f"for {made_for.name} (config {made_for.config}, weights {made_for.weights})" if made_for else "a layer alone"
    )
    return Check("draft", None, f"{detail}: pass it by --speculative-config, and serve its target")


def _quantization(stored: dict[str, Any] | None, kinds: set[str]) -> Check:
    """What config.json says of the scheme, against vLLM's list and the kinds of numbers in the files."""
    if not stored:
        return Check("quantization", None, "none")
    method, known = str(stored.get("quant_method")), _vllm_schemes()
    if known and not {method, method.replace("_", "-")} & known:
        return Check(
            "quantization",
            False,
            f"vLLM has no scheme {shown(method)}",
            "correct quant_method, or fetch config.json again",
        )
    if method not in TRIED_SCHEMES:
        return Check("quantization", None, f"{shown(method)}, which was not tried; vLLM decides when it starts")
    if kinds == {"plain"}:
        return Check(
            "quantization", False, f"{method} by config.json, and all weights are plain", "remove quantization_config"
        )
    return Check("quantization", None, method)


def _vllm_schemes() -> set[str]:
    """Those that vLLM's own sources list; empty where they are not found."""
    found = find_spec("vllm")
    file = Path(found.origin or "").with_name("model_executor") / "layers/quantization/__init__.py" if found else None
    if file is None or not file.is_file():
        return set()
    text = file.read_text(encoding="utf-8").partition("QuantizationMethods = Literal[")[2].partition("]")[0]
    return set(re.findall(r'^ +"([^"]+)",', text, re.MULTILINE))


def _generation_config(folder: Path, vocab_size: int) -> Iterator[Check]:
    from transformers import GenerationConfig

    from vllm_bailing.json_files import read_json
    from vllm_bailing.validation import require_token_ids

    file = folder / "generation_config.json"
    if not file.exists():
        return
    name, fix = "generation_config.json", "correct it, or fetch it again"
    try:
        values = read_json(file)
    except ValueError as error:
        yield Check(name, False, f"{error}, so vLLM ignores it: its stop tokens are lost", fix)
        return
    try:
        if not isinstance(values, dict):
            raise TypeError(f"holds a {type(values).__name__} and not an object")
        require_token_ids("eos_token_id", values.get("eos_token_id"), vocab_size)
        GenerationConfig.from_pretrained(str(folder))
    except Exception as error:  # of any type, from wherever transformers stumbles
        yield Check(name, False, shown(error), fix)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _audited(audit: Any, stored_files: Any, name: str) -> Iterator[Check]:
    from vllm_bailing.errors import CheckpointError

    try:
        audit.check(stored_files)
    except CheckpointError as error:
        yield Check(name, False, *error.finding)
    else:
        yield Check(name, True, "complete, every shape as config.json says")


def _ordinary_ends(folder: Path, config: Any, tokenizer: Any) -> Iterator[Check]:
    """Words of a text that end an answer, where only special tokens should."""
    from vllm_bailing.json_files import read_json

    file = folder / "generation_config.json"
    with contextlib.suppress(ValueError, AttributeError):  # told by _generation_config
        generation = read_json(file).get("eos_token_id") if file.is_file() else None
        known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, None}
        for given in (config.eos_token_id, generation):
            ids = given if isinstance(given, list) else [given]
            for token in (one for one in ids if one not in known):
                detail = (
                    f"eos_token_id {token} is the word {shown(repr(tokenizer.decode([token])))}, and no special token"
                )
                yield Check(
                    "stop tokens", None, detail, "correct it, or fetch config.json and generation_config.json again"
                )


def _template(folder: Path, config: Any) -> Iterator[Check]:
    from vllm_bailing.errors import FilesError
    from vllm_bailing.tools.prompts import read_tokenizer

    try:
        tokenizer = read_tokenizer(folder, "fetch tokenizer.json and tokenizer_config.json again")
    except FilesError as error:
        yield Check("tokenizer", False, *error.finding)
        return
    yield Check("tokenizer", True, f"{len(tokenizer)} tokens")
    yield from _ordinary_ends(folder, config, tokenizer)
    if not tokenizer.chat_template:
        yield Check("chat template", None, "none: /v1/completions works, chat needs --chat-template")
        return
    question = [{"role": "user", "content": "?"}]
    try:
        plain = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        tools = [{"type": "function", "function": {"name": "look_up_name", "parameters": {}}}]
        with_tools = tokenizer.apply_chat_template(question, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        yield Check("chat template", False, shown(error), "pass a corrected one by --chat-template")
        return
    lacks = [
        ability
        for ability, is_there in (
            ("thinking", "detailed thinking" in plain or "<think>" in plain),
            ("tools", "look_up_name" in with_tools),
        )
        if not is_there
    ]
    if lacks:
        yield Check(
            "chat template",
            None,
            f"knows no {' and no '.join(lacks)}, like those of base models",
            'for Ring: --chat-template "$(vllm-bailing chat-template ring)"',
        )
    else:
        yield Check("chat template", True, "with tools and thinking")
