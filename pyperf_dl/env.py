"""What this installation is and what serves each operator: `python -m pyperf_dl.env [--json]`.

Paste its output into a bug report.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import struct
from pathlib import Path
from typing import Any

import torch

import pyperf_dl

from . import _backend, reference


def report() -> dict[str, Any]:
    """Everything the command prints, as JSON-able values.

    Returns:
        a dict with the keys ``versions``, ``platform``, ``build`` (what the installation was compiled with),
        ``binary`` (the compiled library: path, SIMD level in use, CUDA architectures), ``cuda`` (what torch and the
        driver offer), ``backends`` (family -> device type -> backend and reason) and ``environment``.

    >>> from pyperf_dl import env
    >>> env.report()["versions"]["pyperf_dl"] == pyperf_dl.__version__
    True
    """
    return {
        "versions": _versions(),
        "platform": _platform(),
        "build": _build_facts(),
        "binary": _binary(),
        "cuda": _cuda(),
        "backends": {family: {device: _serving(device) for device in device_types()} for family in families()},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("PYPERF_")},
    }


def families() -> list[str]:
    """The families of operators: one reference module each."""
    return sorted(module.name for module in pkgutil.iter_modules(reference.__path__) if not module.name.startswith("_"))


def device_types() -> list[str]:
    """The device types that are there."""
    accelerator = torch.accelerator.current_accelerator()
    present = torch.accelerator.device_count() if accelerator is not None else 0
    return ["cpu", accelerator.type] if accelerator is not None and present else ["cpu"]


def binary_architectures(path: str | Path) -> list[str]:
    """The GPUs that a compiled library has code for, such as ``["sm_80", "sm_90", "compute_90"]``.

    Reads the CUDA fat binaries in the file (a header, then one entry for each architecture), so that no toolkit is
    needed and the answer is about this file, whoever built it.
    """
    data = Path(path).read_bytes()
    found = set()
    magic = struct.pack("<I", 0xBA55ED50)
    start = data.find(magic)
    while start >= 0:
        _, header, size = struct.unpack_from("<HHQ", data, start + 4)
        entry, end = start + header, start + header + size
        while entry + 32 <= min(end, len(data)):
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            if kind not in (1, 2) or entry_header == 0:
                break
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            found.add((architecture, "compute" if kind == 1 else "sm"))
            entry += entry_header + entry_size
        start = data.find(magic, start + 4)
    return [f"{kind}_{number}" for number, kind in sorted(found, key=lambda a: (a[1] == "compute", a))]


def _versions() -> dict[str, str | None]:
    installed: dict[str, str | None] = {"pyperf_dl": pyperf_dl.__version__, "python": platform.python_version()}
    installed["torch"] = torch.__version__
    for name in ("triton", "numpy"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def _platform() -> dict[str, Any]:
    names = platform.freedesktop_os_release() if os.path.exists("/etc/os-release") else {}
    return {
        "system": names.get("PRETTY_NAME", platform.platform(terse=True)),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _build_facts() -> dict[str, str]:
    if importlib.util.find_spec("pyperf_dl._host") is None:
        return {}
    return dict(importlib.import_module("pyperf_dl._host").build_facts())


def _binary() -> dict[str, Any]:
    if _backend._C is None:
        return {"path": None, "problem": _backend.native_error}
    path = str(_backend._C.__file__)
    level = torch.ops.pyperf_dl._simd_level()
    return {"path": path, "simd_level": level, "cuda_architectures": binary_architectures(path)}


def _cuda() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [_device(index) for index in range(count)]
    return {"torch_built_for": torch.version.cuda, "driver_supports": _driver_supports(), "devices": devices}


def _device(index: int) -> dict[str, str]:
    found = torch.cuda.get_device_properties(index)
    memory = f"{found.total_memory / 2**30:.0f} GiB"
    return {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory": memory}


def _driver_supports() -> str | None:
    """The newest CUDA that the driver runs; asked of the driver, so that it shows under a CPU build of torch too."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _serving(device_type: str) -> dict[str, str]:
    backend, reason = _backend.explain(device_type)
    return {"backend": backend, "reason": reason}


def _lines(facts: dict[str, Any]) -> list[str]:
    """Two columns, a heading for each part."""
    lines = []
    for heading, part in facts.items():
        lines.append(heading)
        lines += [f"  {name:<20} {_shown(value)}".rstrip() for name, value in part.items()] or ["  (none)"]
    return lines


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "none"
    if isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()):
        return "; ".join(f"{device}: {served['backend']} ({served['reason']})" for device, served in value.items())
    return ", ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyperf_dl.env", description="What serves each operator, and why.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    facts = report()
    print(json.dumps(facts, indent=2) if options.json else "\n".join(_lines(facts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
