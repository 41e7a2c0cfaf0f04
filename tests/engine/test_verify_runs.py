"""`vllm-bailing verify`: runs that go on, and the memory of the reference."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import (
    changed_demo,
    read_tensors,
    with_two_experts_swapped,
    write_tensors,
)
from tests.support.commands import run_command
from tests.support.engine import run
from vllm_bailing import DEMO
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.reference import BailingMoeV2ForCausalLM
from vllm_bailing.tensor_names import main_tensors
from vllm_bailing.tools import verify, verify_deployment
from vllm_bailing.tools.verify import Served
from vllm_bailing.tools.verify_reference import Asked, Reference, Rounding

FP32 = Rounding("float32")


def deployment_of(folder):
    """What stands in for a server of `folder`: the plain model, asked as `ask_server` asks one."""
    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def ask(_url, _model, prompts):
        for prompt in prompts:
            given = torch.tensor([prompt.token_ids])
            with torch.no_grad():
                ids = model.generate(given, max_new_tokens=prompt.max_tokens, do_sample=False)[0].tolist()
                likely = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            top = [
                {int(one): float(row[one]) for one in {*row.topk(20).indices.tolist(), token}}
                for row, token in zip(likely, ids[1:], strict=True)
            ]
            yield Served(ids, top, len(prompt.token_ids))

    return ask


def test_a_server_is_asked_again_when_a_run_goes_on(tmp_path, monkeypatch):
    """It may be another one by now: the answers of a right one must not speak for a wrong one, or the other way."""
    monkeypatch.setattr(verify, "CACHE", tmp_path / "cache")
    folder = changed_demo(tmp_path / "right")
    right, wrong = deployment_of(folder), deployment_of(changed_demo(tmp_path / "wrong", with_two_experts_swapped))
    said = []

    def run_verify(server, cut=False):
        for module in (verify, verify_deployment):
            monkeypatch.setattr(module, "ask_server", server)

        def progress(stage, done, _total):
            if cut and stage == "reference" and done == 2:
                raise KeyboardInterrupt

        said.clear()
        arguments = {"dtype": "float32", "prompts": ["Who are you?", "What is 2 + 3?"], "max_tokens": 8, "words": 128}
        return verify.run(str(folder), "http://server", **arguments, progress=progress, say=said.append)["computes"]

    assert run_verify(right) and not said
    for before, after, computes in ((right, wrong, False), (wrong, right, True), (right, right, True)):
        with contextlib.suppress(KeyboardInterrupt):
            run_verify(before, cut=True)
            pytest.fail("was not cut off")
        assert run_verify(after) == computes
        (sentence,) = said
        assert "goes on with the run of 20" in sentence and "the deployment is asked again" in sentence
    with contextlib.suppress(KeyboardInterrupt):
        run_verify(right, cut=True)
    tensors = read_tensors(folder)
    with_two_experts_swapped(tensors)
    write_tensors(folder, tensors)
    assert not run_verify(right) and not said


def write_sparse(file, shapes):
    """A file of bf16 tensors in which the large ones are holes, so that they read as zeros and take no room on disk.

    Embedding, norms and routers hold numbers, so that tokens go to experts of all kinds.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(0)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
        for name, entry in header.items():
            if len(entry["shape"]) == 1 or "word_embeddings" in name or name.endswith("gate.weight"):
                values = torch.randn(entry["shape"]).abs() if len(entry["shape"]) == 1 else torch.randn(entry["shape"])
                stream.seek(8 + len(text) + entry["data_offsets"][0])
                stream.write(values.bfloat16().view(torch.int16).numpy().tobytes())


def memory_of_the_reference(folder):
    """(before, at the most) in bytes, of this process."""

    def memory(of):  # not getrusage's figure, which a process has from its parent
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(of))

    start = memory("VmRSS")
    asked = Asked.of([list(range(n, n + 24)) for n in (0, 50)], [[1, 2]] * 46)
    found = Reference(folder, read_config(folder), asked, folder / "work", Rounding("bfloat16"))
    found.forward()
    found.effects(np.tile([[1.0, -1.0]], (2, 46)))
    return start, memory("VmHWM")


def test_one_layer_is_in_memory_at_a_time(tmp_path):
    """4 layers of half a GB: two of them and what is computed is the most that may be used."""
    config = BailingMoeV2Config(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, moe_intermediate_size=512, num_experts=160, n_group=8, topk_group=4,
        num_experts_per_tok=8, first_k_dense_replace=0, routed_scaling_factor=2.5,
    )  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "bailing_moe"}))
    size = 2 * sum(math.prod(shape) for shape in main_tensors(config).values())
    layer = size / config.num_hidden_layers
    assert size > 1.9e9
    files, names = {}, sorted(main_tensors(config))
    for number in range(2):  # two files, each with half of the layers
        part = names[number * len(names) // 2 : (number + 1) * len(names) // 2]
        write_sparse(folder / f"model-{number}.safetensors", {name: main_tensors(config)[name] for name in part})
        files.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    start, peak = run(memory_of_the_reference, folder)
    assert peak - start < 2 * layer + 0.3e9, f"{(peak - start) / 1e9:.2f} GB with layers of {layer / 1e9:.2f} GB"
    shutil.rmtree(folder)


def test_a_process_of_its_own_says_no_more_either(tmp_path):
    done = run_command("verify", DEMO, "--dtype", "int3", cache=tmp_path)
    message = "--dtype int3 is not known; use one of bf16, fp16, fp32, fp8"
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
