"""What a bug report needs to know of a machine: versions, device, threads, memory. Of paths it tells only that they are set."""

import os
import platform
import re
import resource
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from lora_ft import __version__

# Variables that change what the libraries do. Their values are flags and numbers, and are shown ...
SHOWN = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_VERBOSITY"),
    *("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE"),
)
# ... or paths, addresses and secrets: only that they are set.
HIDDEN = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_TOKEN"),
    *("HTTPS_PROXY", "REQUESTS_CA_BUNDLE", "LD_PRELOAD"),
)
SHOWN_AT_MOST = 40  # characters of a value


def environment() -> dict[str, Any]:
    """Facts by name, in the order of a report. Nothing fails: what can't be found out is said in its place."""
    facts = {"lora-ft": __version__, "python": f"{platform.python_implementation()} {platform.python_version()}"}
    facts |= {"system": platform.platform()} | {name: _version(name) for name in packages()}
    return facts | _machine() | _device() | _variables()


def report() -> str:
    """`environment()` for people: a line a fact, to be pasted into an issue."""
    facts = environment()
    width = max(map(len, facts))
    return "".join(f"{name:<{width}}  {value}\n" for name, value in facts.items())


def packages() -> list[str]:
    """The packages that lora-ft stands on, as its own metadata lists them, and PEFT, which reads its adapters."""
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


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"cpu": f"{_cpu_name()}, {cores} cores for this process"}
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(meminfo[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
        facts["memory"] = f"{total:.1f} GiB, {free:.1f} GiB of it free"
    except (OSError, ValueError, KeyError):
        facts["memory"] = "not known"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        facts["memory"] += f", ulimit -v {limit / 2**30:.1f} GiB"
    facts["disk here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free"
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _device() -> dict[str, Any]:
    try:
        import torch
    except Exception as e:  # a broken installation is what such a report is for
        return {"device": f"torch can't be imported: {type(e).__name__}: {e}"}
    devices = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i} {about.name}, {about.total_memory / 2**30:.1f} GiB")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return {"device": "; ".join(devices) or "cpu", "torch build": built, "torch threads": torch.get_num_threads()}


def _variables() -> dict[str, str]:
    facts = {name: os.environ[name][:SHOWN_AT_MOST] for name in SHOWN if name in os.environ}
    return facts | {name: "set" for name in HIDDEN if name in os.environ}
