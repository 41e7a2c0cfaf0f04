"""Makes torch report the GPU that the stub of libnvidia-ml reports, in every Python that has this on its path."""

import importlib.abc
import importlib.util
import os
import sys
from types import SimpleNamespace

_MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}


def _pretend(torch):
    name, count = os.environ["FAKE_GPU_NAME"], int(os.environ["FAKE_GPU_COUNT"])
    capability = int(os.environ["FAKE_GPU_CAPABILITY"])
    memory = int(os.environ["FAKE_GPU_GIB"]) << 30
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name=name,
        major=major,
        minor=minor,
        total_memory=memory,
        multi_processor_count=_MULTIPROCESSORS[capability],
        warp_size=32,
        regs_per_multiprocessor=2**16,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block=48 * 2**10,
        shared_memory_per_block_optin=227 * 2**10 if capability in (90, 100, 103) else 99 * 2**10,
        shared_memory_per_multiprocessor=228 * 2**10,
        L2_cache_size=50 * 2**20,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        uuid="GPU-0",
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        pci_bus_id=0,
        pci_device_id=0,
        pci_domain_id=0,
    )
    answers = {
        "is_available": True,
        "device_count": count,
        "get_device_capability": (major, minor),
        "get_device_properties": properties,
        "get_device_name": name,
        "current_device": 0,
        "is_bf16_supported": True,
        "mem_get_info": (memory, memory),
        "get_arch_list": [f"sm_{capability}"],
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
        **dict.fromkeys(("set_device", "_lazy_init", "synchronize", "empty_cache")),
    }
    for function, answer in answers.items():
        setattr(torch.cuda, function, lambda *args, _answer=answer, **kwargs: _answer)


class _AfterTorch(importlib.abc.MetaPathFinder):
    is_searching = False  # others look for torch without importing it

    def find_spec(self, fullname, path, target=None):
        if fullname != "torch" or self.is_searching:
            return None
        self.is_searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_searching = False
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _pretend(module)

        spec.loader.exec_module = exec_module
        return spec


if "FAKE_GPU_NAME" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())
