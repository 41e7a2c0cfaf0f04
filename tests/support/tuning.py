"""Candidates of the tuner, and a timer whose times are made up."""

from __future__ import annotations

import random

from vllm_bailing.tuning.search import CandidateFailed
from vllm_bailing.tuning.space import FIELDS, Experts

MINI = Experts(256, 512, 2048, 8, 8, 4, "bf16")
TINY = Experts(16, 128, 256, 2, 4, 2, "fp8")
H20 = "NVIDIA H20"
# (experts, GPU, the name of the file that vLLM looks for)
NAMES = [
    (MINI, H20, "E=256,N=512,device_name=NVIDIA_H20.json"),
    (MINI, "NVIDIA H100 80GB HBM3", "E=256,N=512,device_name=NVIDIA_H100_80GB_HBM3.json"),
    (
        Experts(256, 1024, 4096, 8, 8, 4, "fp8"),
        "NVIDIA H20-3e",
        "E=256,N=1024,device_name=NVIDIA_H20-3e,dtype=fp8_w8a8,block_shape=[128,128].json",
    ),
    # vLLM has one name for the H200 family.
    (
        Experts(64, 256, 8192, 8, 8, 4, "fp8"),
        "NVIDIA H200 NVL",
        "E=64,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
    ),
]


def config(*values: int) -> dict[str, int]:
    return dict(zip(FIELDS, values, strict=True))


DEFAULT = config(16, 64, 128, 1, 4, 4)
TEN, ONE, SLOW = config(16, 64, 64, 1, 4, 3), config(16, 32, 64, 1, 4, 3), config(16, 128, 64, 1, 8, 3)


class FakeTimer:
    """Times from a table in ms, with noise of which one part changes from draw to draw and one with every timing."""

    def __init__(self, times, noise=0.0, seed=0):
        self.times = {tuple(one.values()): ms for one, ms in times}
        self.noise, self.random, self.timed = noise, random.Random(seed), []

    def start(self, tokens, default):
        self.tokens = tokens

    def route(self, draw):
        self.drift = 1 + 0.3 * random.Random(draw).random()

    def arm(self, one):
        self.timed.append((self.tokens, tuple(one.values())))
        ms = self.times[tuple(one.values())]
        if ms is None:
            raise CandidateFailed("out of resource: shared memory")
        return lambda: ms * self.drift * (1 + self.noise * self.random.uniform(-1, 1))


MACHINE = {
    "gpu": H20,
    "compute_capability": "9.0",
    "driver": "580.1",
    "cuda": "12.9",
    "torch": "2.13.0",
    "triton": "3.6.0",
    "vllm": "0.32.0",
    "vllm_bailing": "0.1.0",
    "python": "3.11",
}
