"""What a result needs said about where it was made: the machine and the versions, without names of hosts or paths."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "bottleneck",
    "pandas",
    "polars",
    "opencv-python-headless",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "scikit-learn",
    "statsmodels",
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Has malloc keep what is freed, as the CUDA caching allocator does.

    Otherwise each output of 32 MiB and more is fetched from the system anew, and all contenders' times are those of
    the page faults.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        # An aligned block that was freed is a little too small for the next one like it, so memory moves on through the
        # heap before it comes back: here are pages enough that are there already.
        torch.zeros(2**30, dtype=torch.uint8)


def output_of(*command: str) -> str:
    """What a command prints, stripped; empty where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _from_proc(file: str, field: str) -> str:
    try:
        found = re.search(rf"^{field}\s*:\s*(.+)$", Path(file).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found.group(1) if found else ""


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {
        "name": properties.name,
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "l2_mib": round(properties.L2_cache_size / 2**20),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def machine(device: str) -> dict[str, Any]:
    """CPU, cores, memory, system, and the GPU if the device is one."""
    memory = _from_proc("/proc/meminfo", "MemTotal").split()
    return {
        "cpu": _from_proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gib": round(int(memory[0]) / 2**20) if memory else None,
        "os": f"{platform.system()} {platform.machine()}",
        "simd": simd_level(),
        "gpu": _gpu() if device == "cuda" else None,
    }


def simd_level() -> str | None:
    """The instruction level of the CPU kernels, if the compiled library is there."""
    try:
        return torch.ops.pyperf_dl._simd_level()
    except (AttributeError, RuntimeError):
        return None


def versions() -> dict[str, str]:
    """Python, this package and its commit, and every package that may take part."""
    import pyperf_dl

    found = {"python": platform.python_version(), "pyperf_dl": pyperf_dl.__version__}
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    if commit:
        changed = output_of("git", "status", "--porcelain", "--", "pyperf_dl", "csrc", "kernels")
        found["commit"] = commit + ("+changes" if changed else "")
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line(arguments: list[str]) -> str:
    """The command as one would type it in the repository; absolute paths are cut to their last part."""
    shown = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return " ".join(["python", "bench/run.py", *shown])
