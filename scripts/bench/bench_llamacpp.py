"""This package and llama.cpp on the same checkpoint and processor, taking turns.

    python scripts/bench/bench_llamacpp.py --get                       # builds llama.cpp: 10 minutes on two cores
    python scripts/bench/bench_llamacpp.py MODEL --bits bf16 --bits q8_0 --bits q4_0
    python scripts/bench/bench_llamacpp.py MODEL --ours bf16 --ours w8a8+w8a8 --ours w4a16+w8a8 --bits q8_0 --bits q4_0

llama.cpp comes from the source package of llama-cpp-python on PyPI, with its own converter and `llama-batched-bench`;
`--tools` names a folder with builds of your own instead. MODEL is a folder, or a shape of `vllm-bailing bench` such as
mid, whose random weights are written first; `--ours` takes schemes of `vllm-bailing quantize`, and that of the head
after a plus sign. A shape that is too large to write in bf16 is written with `--written` layers, and what comes of them
in other bits gets copies of the last one. Both sides get prompts
of the same lengths, as many tokens to write and the same threads. The file for llama.cpp has no vocabulary: no text is
read or written. Prints the table of docs/cpu.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_files import ROOT, random_checkpoint
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_bailing.bench import shapes
from vllm_bailing.bench.in_tree import CompareTask
from vllm_bailing.bench.runner import turns
from vllm_bailing.config import read_config
from vllm_bailing.tools.task import run_task

PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ROOT / "build" / "llama.cpp"
PLUGIN = "vllm-bailing"
ALIKE = {
    "bf16": "bf16",
    "w8a8": "q8_0",
    "w4a16": "q4_0",
    "fp8-block": "q8_0",
}  # schemes, and what llama.cpp has of the same size
_TRIES = 5  # results go through a log of llama.cpp, whose end is lost now and then
FIGURES = ("prefill 512", "decode 1", "decode 16")
# The converter knows the tokenizers of published models by their hashes, and no others; none is needed.
CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.bailingmoe import BailingMoeV2Model
BailingMoeV2Model.set_vocab = lambda self: self._set_vocab_none()
convert_hf_to_gguf.main()
"""
# Copies of the last layer, until the file has as many layers as the last argument says.
LENGTHEN = """
import sys
from gguf import GGUFReader, GGUFValueType, GGUFWriter
source, out, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
reader = GGUFReader(source)
architecture = reader.get_field('general.architecture').contents()
writer = GGUFWriter(out, architecture)
for field in reader.fields.values():
    if field.name == 'general.architecture' or field.name.startswith('GGUF.'):
        continue
    kind, value = field.types[0], field.contents()
    if field.name == f'{architecture}.block_count':
        value, written = layers, value
    writer.add_key_value(field.name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
last = f'blk.{written - 1}.'
for tensor in reader.tensors:
    copies = range(written, layers) if tensor.name.startswith(last) else ()
    for name in (tensor.name, *(tensor.name.replace(last, f'blk.{layer}.') for layer in copies)):
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
"""


@dataclass
class LlamaCpp:
    """llama.cpp with one file of its format."""

    file: Path
    tools: Path
    threads: int
    prompt_tokens: int = 32
    output_tokens: int = 64
    peak: int = 0  # bytes of memory, the file's pages among them

    def measure(self) -> dict[str, Any]:
        """Figures in tokens/s, under the names of `CompareTask`'s."""
        figures = {"prefill 512": self._run(512, 1, 1)["speed_pp"]}
        for size in (1, 16):
            figures[f"decode {size}"] = self._run(self.prompt_tokens, self.output_tokens, size)["speed_tg"]
        return {"figures": {**figures, "memory": self.peak / 1e9}}

    def _run(self, prompt: int, tokens: int, requests: int) -> dict[str, float]:
        command = [str(self.tools / "llama-batched-bench"), "-m", str(self.file), "-t", str(self.threads)]
        command += ["-tb", str(self.threads), "-c", str((prompt + tokens) * requests + 64), "-npp", str(prompt)]
        command += ["-ntg", str(tokens), "-npl", str(requests), "-b", "2048", "-ub", "512", "--output-format", "jsonl"]
        for _ in range(_TRIES):
            with tempfile.TemporaryFile("w+") as results, tempfile.TemporaryFile("w+") as log:
                process = subprocess.Popen(command, stdout=results, stderr=log)
                _, status, usage = os.wait4(process.pid, 0)
                results.seek(0)
                log.seek(0)
                rows = [json.loads(line) for line in results if line.startswith("{")]
                said = log.read().strip()[-300:]
            if status or rows:
                break
        if status or not rows:
            raise RuntimeError(f"llama-batched-bench ended with status {status}: {said}")
        self.peak = max(self.peak, usage.ru_maxrss * 1024)
        return rows[-1]


def get(tools: Path) -> None:
    """Download the source package and build what is needed of it.

    Raises:
        SystemExit: If a step fails.
    """
    tools.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    _call([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(tools), PACKAGE])
    _call([*pip, "install", "--target", str(tools / "python"), "cmake", "ninja"])
    [archive] = tools.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tools, filter="data")
    [source] = tools.glob("*/vendor/llama.cpp")
    build = tools / "build"
    cmake = [str(tools / "python" / "bin" / "cmake")]
    env = {"PATH": f"{tools / 'python' / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tools / "python")}
    switches = ("-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF")
    switches += tuple(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "SERVER", "EXAMPLES", "APP"))
    _call([*cmake, "-G", "Ninja", "-S", str(source), "-B", str(build), *switches], env)
    targets = ("llama-batched-bench", "llama-quantize")
    _call([*cmake, "--build", str(build), "-j", str(len(os.sched_getaffinity(0))), "-t", *targets], env)
    for name in targets:
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(build / "bin" / name)
    (tools / "converter").unlink(missing_ok=True)
    (tools / "converter").symlink_to(source)


def _call(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env={**os.environ, **(env or {})}, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {done.returncode}; see above")


def convert(model: Path, bits: str, tools: Path, work: Path, layers: int) -> Path:
    """The checkpoint in llama.cpp's format, with so many layers.

    Raises:
        SystemExit: If its tools fail.
    """
    plain = work / "bf16.gguf"
    paths = f"{tools / 'converter' / 'gguf-py'}:{tools / 'python'}"
    if not plain.exists():
        arguments = [str(tools / "converter"), str(model), "--outtype", "bf16", "--outfile", str(plain)]
        _call([sys.executable, "-c", CONVERT, *arguments], {"PYTHONPATH": paths})
    if bits == "bf16":
        return plain
    file = work / f"{bits}.gguf"
    _call([str(tools / "llama-quantize"), "--pure", str(plain), str(file), bits])
    if layers != read_config(str(model)).num_hidden_layers:
        short = file.rename(work / f"short-{bits}.gguf")
        _call([sys.executable, "-c", LENGTHEN, str(short), str(file), str(layers)], {"PYTHONPATH": paths})
        short.unlink()
    return file


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Medians with the range, and this package over llama.cpp round by round."""
    table = Table("", *(f"{name}, tokens/s" for name in FIGURES), "memory, GB")
    for arm, rounds in results.items():
        cells = []
        for name in FIGURES:
            values = [one["figures"][name] for one in rounds]
            digits = 0 if min(values) >= 100 else 1
            cells.append(f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]")
        cells.append(f"{max(one['figures']['memory'] for one in rounds):.1f}")
        table.add_row(arm, *cells)
    for arm, other in _pairs(results):
        rounds = list(zip(results[arm], results[other], strict=True))
        ratios = [[ours["figures"][name] / one["figures"][name] for ours, one in rounds] for name in FIGURES]
        cells = [f"{statistics.median(one):.2f} [{min(one):.2f}-{max(one):.2f}]" for one in ratios]
        table.add_row(f"{arm} / {other}", *cells)
    Console(width=120).print(table)


def _pairs(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Arms that are compared: those of this package with its first, and with llama.cpp at the same bits."""
    ours = [arm for arm in results if arm.startswith(PLUGIN)]
    peers = [(arm, f"llama.cpp {ALIKE.get(arm.split()[1].partition('+')[0])}") for arm in ours]
    return [(arm, ours[0]) for arm in ours[1:]] + [pair for pair in peers if pair[1] in results]


def lengthen(folder: Path, layers: int) -> None:
    """Give a checkpoint copies of its last layer, until it has so many."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written, config["num_hidden_layers"] = config["num_hidden_layers"], layers
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    last, tensors = f"model.layers.{written - 1}.", {}
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for file in list(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(last)}  # noqa: SIM118
    for layer in range(written, layers):
        copies = {name.replace(last, f"model.layers.{layer}."): tensor for name, tensor in tensors.items()}
        save_file(copies, folder / f"layer-{layer}.safetensors", {"format": "pt"})


def quantized(model: Path, scheme: str, work: Path, layers: int) -> Path:
    """The checkpoint as `vllm-bailing quantize` writes it, with so many layers.

    Raises:
        SystemExit: If that fails.
    """
    if scheme == "bf16":
        return model
    is_short = layers != read_config(str(model)).num_hidden_layers
    linear, _, head = scheme.partition("+")
    command = [str(Path(sys.executable).with_name("vllm-bailing")), "quantize", str(model), str(work / scheme)]
    _call([*command, "--scheme", linear, *(["--head", head] if head else [])])
    if is_short:
        lengthen(work / scheme, layers)
    return work / scheme


def main(
    model: Annotated[str, typer.Argument(help="A folder with a bf16 checkpoint, or a shape such as mid.")] = "",
    bits: Annotated[list[str], typer.Option(help="Of llama.cpp: bf16, q8_0, q4_0 ...; may be given again.")] = [],  # noqa: B006
    ours: Annotated[list[str], typer.Option(help="bf16, or SCHEME[+HEAD] of quantize; may be given again.")] = ["bf16"],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Of every arm.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="Of both sides; all cores if left out.")] = 0,
    engine: Annotated[str, typer.Option(help="JSON: arguments of vllm.LLM, such as quantization.")] = "{}",
    written: Annotated[int, typer.Option(help="Layers of a shape that are written in bf16; 0 for all.", min=0)] = 0,
    tools: Annotated[Path, typer.Option(help="Folder with llama.cpp's tools.")] = TOOLS,
    get_: Annotated[bool, typer.Option("--get", help="Build llama.cpp first.")] = False,
) -> None:
    """Measure and print the table."""
    if get_:
        get(tools)
    if not model:
        raise typer.Exit
    missing = [name for name in ("llama-batched-bench", "llama-quantize", "converter") if not (tools / name).exists()]
    if written and (model not in shapes.SHAPES or "bf16" in (*ours, *bits)):
        raise SystemExit("--written is for shapes, and leaves nothing to measure in bf16; take other --ours and --bits")
    if bits and missing:
        raise SystemExit(f"{tools} has no {', no '.join(missing)}; call with --get, or name another folder by --tools")
    cores = sorted(os.sched_getaffinity(0))[: threads or None]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(model)
        if model in shapes.SHAPES:
            folder, shape = Path(work) / model, shapes.SHAPES[model]
            layers = shape["num_hidden_layers"]
            random_checkpoint(folder, {**shape, "num_hidden_layers": written or layers})
        else:
            layers = read_config(model).num_hidden_layers
        plain = shapes.without_mtp(str(folder), Path(work) / "plain")  # the other side does without
        env = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        options = {"dtype": "bfloat16", **json.loads(engine)}
        tasks = {
            f"{PLUGIN} {one}": CompareTask(
                str(quantized(Path(plain), one, Path(work), layers)), options, [1, 16], [512], env=env
            )
            for one in ours
        }
        files = {f"llama.cpp {one}": convert(Path(plain), one, tools, Path(work), layers) for one in bits}
        results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*tasks, *files)}
        for arm in track(turns(results, rounds), description="rounds", console=Console(stderr=True)):
            found = run_task(tasks[arm]) if arm in tasks else LlamaCpp(files[arm], tools, len(cores)).measure()
            results[arm].append(found)
        show(results)


if __name__ == "__main__":
    typer.run(main)
