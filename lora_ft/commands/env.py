"""`lora-ft env`: what a bug report needs to know of a machine. Of paths and secrets it prints only that they are set."""

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import psutil

from lora_ft.core import machine
from lora_ft.core.version import __version__

# Variables that change what the libraries do: those whose values are flags and numbers ...
PRINTED_VARIABLES = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_VERBOSITY"),
    *("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE"),
)
# ... and those that hold paths, addresses or secrets.
SECRET_VARIABLES = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_TOKEN"),
    *("HTTPS_PROXY", "REQUESTS_CA_BUNDLE", "LD_PRELOAD"),
)
MAX_VALUE_CHARS = 40


def environment() -> dict[str, Any]:
    """Facts by name, in the order of a report. Never fails: a fact that can't be determined says so."""
    facts = {"lora-ft": __version__, "python": f"{platform.python_implementation()} {platform.python_version()}"}
    facts |= {"system": platform.platform()} | {name: _version(name) for name in packages()}
    facts |= {"cpu": f"{machine.cpu_name()}, {machine.cores()} cores for this process"}
    free = machine.free_memory()
    facts |= {"memory": f"{_gib(psutil.virtual_memory().total)}, {_gib(free.size)} {free.where}"}
    facts |= {"disk here": f"{_gib(shutil.disk_usage('.').free)} free"}
    values = {name: os.environ[name][:MAX_VALUE_CHARS] for name in PRINTED_VARIABLES if name in os.environ}
    return facts | _device() | values | {name: "set" for name in SECRET_VARIABLES if name in os.environ}


def report() -> str:
    """`environment()` as text, one fact per line, to be pasted into an issue."""
    facts = environment()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def packages() -> list[str]:
    """The packages that lora-ft depends on by its own metadata, and PEFT, which reads its adapters."""
    try:
        needed = requires("lora-ft") or []
    except PackageNotFoundError:  # run from its source
        needed = ["torch", "transformers", "datasets", "accelerate", "safetensors", "tokenizers"]
    names = [re.split(r"[^\w.-]", need)[0] for need in needed if "extra ==" not in need]
    return sorted(names, key=lambda name: (name not in ("torch", "transformers"), name)) + ["peft"]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device() -> dict[str, Any]:
    try:
        import torch

        from lora_ft.model.device import accelerator
    except Exception as e:  # a broken installation is a reason for such a report
        return {"device": f"torch can't be imported: {type(e).__name__}: {e}"}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    device = "; ".join(f"cuda:{i} {gpu.name}, {_gib(gpu.total_memory)}" for i, gpu in enumerate(gpus))
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return {"device": device or accelerator(), "torch build": built, "torch threads": torch.get_num_threads()}


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
