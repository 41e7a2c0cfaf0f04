"""Results of benchmarks that are made up, with a known gain and noise."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic

from vllm_bailing.bench import statistics
from vllm_bailing.bench.statistics import KINDS, PLUGIN
from vllm_bailing.tools.task import Task


def planted(gains, rounds=5, noise=0.02, drift=0.0, **figures):
    """Results of `bench.alternate` for arms that are `gains` times as good, with noise and a drift over the rounds."""
    draw = np.random.default_rng(1)

    def value(figure, base, gain, number):
        disturbed = base * (1 + drift * number) * (1 + noise * draw.standard_normal())
        return disturbed * gain if KINDS[figure.split()[0]].more_is_better else disturbed / gain

    figures = figures or {"decode 1": 50.0, "TTFT 1": 20.0, "memory": 2.0}
    return {
        arm: [{"figures": {name: value(name, base, gain, n) for name, base in figures.items()}} for n in range(rounds)]
        for arm, gain in gains.items()
    }


def verdicts(results, arm=PLUGIN):
    return {row["figure"]: row["verdict"] for row in statistics.summarize(results) if row["arm"] == arm}


@dataclass
class EchoTask(Task):
    """Measures nothing: says where it ran, or fails as an engine does."""

    failure: str = ""
    checked: bool = False
    waits: str = ""

    def work(self):
        if self.failure:
            raise RuntimeError(self.failure)
        if self.checked:
            pydantic.create_model("Checked", max_model_len=int)(**self.engine)
        if self.waits:  # as an engine and its worker, which are not told when to end
            child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            Path(self.waits).write_text(f"{os.getpid()} {child.pid}")
            signal.pause()
        return {"model": self.model, "process": os.getpid(), "variable": os.environ["A_VARIABLE"]}

    def read(self, stored):
        return {**stored, "was_read": True}
