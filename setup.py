"""Builds pyperf_dl._C (operators, libtorch stable ABI, CPU and CUDA in one file) and pyperf_dl._host (pybind11).

Environment: PYPERF_CUDA=auto|0|1, PYPERF_CUDA_ARCHS="80;90;90+PTX", PYPERF_PREBUILT=1, MAX_JOBS. See docs/env.md.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # oldest torch whose stable ABI the binary asks for: 2.10
DEFAULT_ARCHS = "80;90;90+PTX"
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def compiled_platform():
    """Where the C++ core is built; elsewhere the package installs without it and runs the reference."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


def find_nvcc():
    choice = os.environ.get("PYPERF_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"PYPERF_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    if choice == "1":
        sys.exit("PYPERF_CUDA=1 but no nvcc was found: put it on the PATH or set CUDA_HOME")
    return None


def gencode_flags():
    """'80;90;90+PTX' -> SASS for sm_80 and sm_90, and PTX of compute_90 for what comes after."""
    flags = []
    for arch in os.environ.get("PYPERF_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";"):
        match = re.fullmatch(r"\s*(\d+[af]?)(\+PTX)?\s*", arch)
        if not match:
            sys.exit(f"PYPERF_CUDA_ARCHS: expected entries such as 80 or 90+PTX, got {arch!r}")
        number, ptx = match.groups()
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return flags


def cuda_link_flags(nvcc):
    """Directories and libraries that nvcc itself would link, for cudart_static."""
    dry = subprocess.run([nvcc, "--dryrun", "-cudart=static", "x.o"], capture_output=True, text=True, cwd=ROOT).stderr
    libraries = re.search(r"LIBRARIES=(.*)", dry)
    paths = re.findall(r'"?-L([^"\s]+)"?', libraries.group(1) if libraries else "")
    return [f"-L{p}" for p in paths] + ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


class BuildExtensions(build_ext):
    """Compiles every source whose own text, included headers or command changed, MAX_JOBS at a time, then links."""

    def run(self):
        super().run()
        if self.inplace:  # so that the tree itself can be imported, without an installation
            link = ROOT / "pyperf_dl" / "_triton"
            if not link.exists():
                link.symlink_to(Path("..", "kernels", "triton"))

    def build_extension(self, ext):
        if ext.name.endswith("._host"):
            return super().build_extension(ext)
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        nvcc = find_nvcc()
        objects_dir = ROOT / "build" / "objects"  # kept between builds, whoever runs them
        objects_dir.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        includes = [flag for path in [*include_paths(), sysconfig.get_path("include")] for flag in ("-isystem", path)]
        common = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        flags = [
            *common,
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-Wall",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
        ]
        flags += [f"-ffile-prefix-map={ROOT}=.", *(f"-ffile-prefix-map={p}=torch" for p in include_paths())]
        host_flags = ",".join(flag for flag in flags[len(common) :] if "=" not in flag or flag.startswith("-f"))
        cuda_flags = [*common, "--fmad=false", "-Xcompiler", host_flags, "-diag-suppress=177", *gencode_flags()]
        jobs, objects = [], []
        for source in sorted(ext.sources):
            is_cuda = source.endswith(".cu")
            if is_cuda and not nvcc:
                continue
            target = objects_dir / (source.replace("/", "_") + ".o")
            objects.append(str(target))
            command = [nvcc, *cuda_flags] if is_cuda else [cxx, *flags]
            command += [*includes, "-MMD", "-MF", f"{target}.d", "-c", source, "-o", str(target)]
            if not up_to_date(target, command, torch.__version__):
                jobs.append((source, target, command, torch.__version__))
        with ThreadPoolExecutor(max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))) as pool:
            list(pool.map(lambda job: compile_object(*job), jobs))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [cxx, "-shared", "-o", str(output), *objects, "-Wl,--no-as-needed", *(f"-L{p}" for p in library_paths())]
        link += ["-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed", "-Wl,--build-id=none", "-s"]
        if nvcc:
            link += cuda_link_flags(nvcc)
        link += ["-Wl,--exclude-libs,ALL"]
        stamp = objects_dir / "link.json"
        if jobs or not output.exists() or not stamp.exists() or json.loads(stamp.read_text()) != link:
            run(link, f"link {output.name}")
            stamp.write_text(json.dumps(link))


def run(command, label):
    print(f"[pyperf_dl] {label}", flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.stdout or done.stderr:
        print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"[pyperf_dl] failed: {' '.join(map(str, command))}")


def compile_object(source, target, command, torch_version):
    run(command, f"compile {source}")
    target.with_suffix(".stamp").write_text(stamp_of(target, command, torch_version))


def dependencies(target):
    """The project's own files that the object was made from, as the compiler wrote them down."""
    text = Path(f"{target}.d").read_text().replace("\\\n", " ")
    paths = (Path(ROOT, word) for word in text.split(":", 1)[1].split())
    return sorted({str(p.resolve()) for p in paths if p.resolve().is_relative_to(ROOT)})


def stamp_of(target, command, torch_version):
    digest = hashlib.sha256(json.dumps([command, torch_version]).encode())
    for path in dependencies(target):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def up_to_date(target, command, torch_version):
    stamp = target.with_suffix(".stamp")
    try:
        return target.exists() and stamp.read_text() == stamp_of(target, command, torch_version)
    except OSError:
        return False


def prebuilt():
    """PYPERF_PREBUILT=1: the operators were compiled elsewhere and lie in the tree; only _host is built."""
    if os.environ.get("PYPERF_PREBUILT", "0") != "1":
        return False
    if not (ROOT / "pyperf_dl" / "_C.abi3.so").exists():
        sys.exit("PYPERF_PREBUILT=1 but there is no pyperf_dl/_C.abi3.so")
    return True


def extensions():
    if not compiled_platform():
        return []
    import pybind11

    core_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu"))
    host = [s for s in core_sources if s.startswith("csrc/host/")]
    core = [s for s in core_sources if s not in host]
    headers = sorted(str(p.relative_to(ROOT)) for d in ("csrc", "kernels") for p in (ROOT / d).rglob("*.*h"))
    nvcc = None if prebuilt() else find_nvcc()
    facts = {
        "PYPERF_BUILD_CUDA_ARCHS": os.environ.get("PYPERF_CUDA_ARCHS", DEFAULT_ARCHS) if nvcc else "",
        "PYPERF_BUILD_NVCC": nvcc_version(nvcc) if nvcc else "",
        "PYPERF_BUILD_TORCH": installed_torch(),
        "PYPERF_VERSION": re.search(r'version = "(.*?)"', (ROOT / "pyproject.toml").read_text()).group(1),
    }
    operators = Extension("pyperf_dl._C", core, depends=headers, py_limited_api=not FREE_THREADED)
    host_side = Extension(
        "pyperf_dl._host",
        host,
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, json.dumps(value)) for name, value in facts.items()],
        depends=headers,
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-g0",
            f"-ffile-prefix-map={ROOT}=.",
        ],
        extra_link_args=["-s"],
        language="c++",
    )
    return [host_side] if prebuilt() else [operators, host_side]


def nvcc_version(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else "unknown"


def installed_torch():
    import torch

    return torch.__version__


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
