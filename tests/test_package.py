"""What holds the package together: versions, imports, command lines, symbols of the binary, layers, file names."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyperf_dl
from pyperf_dl import _backend, check, env

ROOT = Path(__file__).resolve().parent.parent
CODE = (".py", ".h", ".cuh", ".cpp", ".cu")
FAMILY_FILES = (  # a large family has several in a folder, named after their parts
    "csrc/{}.cpp",
    "csrc/{}.cu",
    "kernels/cpu/{}*.h",
    "kernels/cuda/{}*.cuh",
    "kernels/triton/{}.py",
    "pyperf_dl/{}.py",
    "pyperf_dl/_launch/{}.py",
    "pyperf_dl/reference/{}.py",
    "tests/test_{}*.py",
    "bench/bench_{}.py",
    "docs/{}.md",
)
HOST_FILES = (  # a family that has no kernels
    "csrc/host/{}.cpp",
    "pyperf_dl/{}.py",
    "pyperf_dl/reference/{}.py",
    "tests/test_{}*.py",
    "bench/bench_{}.py",
    "docs/{}.md",
)
compiled = pytest.mark.skipif(_backend._C is None, reason="the compiled library is not there")


def python(*arguments, **settings):
    """Another Python, outside the source tree."""
    environment = {**os.environ, **settings}
    return subprocess.run(
        [sys.executable, *arguments], cwd=Path(sys.prefix), env=environment, capture_output=True, text=True, check=False
    )


def sources(*folders, suffixes=CODE):
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


# ---- versions and imports ----


def test_versions_agree():
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert pyperf_dl.__version__ == declared
    assert importlib.metadata.version("pyperf_dl") == declared
    assert f"## {declared}" in (ROOT / "CHANGELOG.md").read_text().replace("[", "").replace("]", "")
    if _backend._C is not None:
        assert importlib.import_module("pyperf_dl._host").build_facts()["version"] == declared


def test_import_loads_neither_triton_nor_dtensor():
    heavy = ("triton", "torch.distributed.tensor", "pyperf_dl._triton", "pyperf_dl._host", "torch._inductor")
    done = python("-c", f"import torch, sys; before = set(sys.modules); import pyperf_dl; "
                        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])")  # fmt: skip
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_triton_kernels_are_a_subpackage():
    assert importlib.util.find_spec("pyperf_dl._triton") is not None
    assert importlib.util.find_spec("kernels") is None or "site-packages" not in str(
        importlib.util.find_spec("kernels")
    )


# ---- command lines ----


def test_env_tells_what_serves_every_family():
    done = python("-m", "pyperf_dl.env", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["backends"]) == set(env.families())
    for served in facts["backends"].values():
        assert set(served) == set(env.device_types())
        assert all(s["backend"] in _backend.NAMES and s["reason"] for s in served.values())
    text = python("-m", "pyperf_dl.env").stdout
    assert "simd_level" in text or _backend._C is None


@compiled
def test_check_finds_every_operator_right():
    done = python("-m", "pyperf_dl.check", "--quick", "--json", "--backend", "native", "--device", "cpu")
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    results = json.loads(done.stdout)["results"]
    assert {r["family"] for r in results} == set(env.families())
    assert not [r for r in results if r["problem"]]


def test_check_sees_what_is_wrong():
    want = torch.tensor([1.0, 0.0, torch.nan, torch.inf])
    assert check.difference(want.clone(), want, 0) == (0.0, "")
    for i, value in enumerate((1.5, -0.0, 1.0, torch.nan)):
        got = want.clone()
        got[i] = value
        assert f"[{i}]" in check.difference(got, want, 0)[1]
    assert not check.difference(want + 1e-7, want, 1e-6)[1]
    assert check.difference(want + 1e-5, want, 1e-6)[1]
    assert check.difference(want.double(), want, 1)[1]
    assert check.difference(want[:2], want, 1)[1]


def test_check_fails_on_a_miss(monkeypatch, capsys):
    monkeypatch.setattr(check, "difference", lambda *_: (1.0, "planted"))
    arguments = ["--quick", "--device", "cpu", "--backend", "reference"]
    assert check.main(arguments) == 1
    assert "planted" in capsys.readouterr().out


# ---- the binary ----


@compiled
@pytest.mark.parametrize("level", ["baseline", "x86-64-v3", "x86-64-v4"])
def test_simd_level_can_be_chosen(level):
    highest = python("-c", "import pyperf_dl, torch; print(torch.ops.pyperf_dl._simd_level())", PYPERF_SIMD="").stdout
    levels = ["baseline", "x86-64-v3", "x86-64-v4"]
    if levels.index(level) > levels.index(highest.strip()):
        pytest.skip(f"this processor stops at {highest.strip()}")
    program = "import pyperf_dl, torch; print(torch.ops.pyperf_dl._simd_level())"
    assert python("-c", program, PYPERF_SIMD=level).stdout.strip() == level
    done = python("-m", "pyperf_dl.check", "--quick", "--backend", "native", "--device", "cpu", PYPERF_SIMD=level)
    assert done.returncode == 0, done.stdout + done.stderr


@compiled
def test_no_build_path_in_the_binaries():
    host = importlib.import_module("pyperf_dl._host")
    for library in (_backend._C.__file__, host.__file__):
        data = Path(library).read_bytes()
        for path in (ROOT, Path.home(), Path(torch.__file__).parent):
            assert f"{path}/".encode() not in data, library


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_unstable_symbol():
    """Of torch only its C shim, of Python only the limited API, of C++ only the standard library."""
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", _backend._C.__file__], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].split("@")[0] for line in text.stdout.splitlines()}
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.match(r"_Z(N[KVO]*|T[IVST]N?)?(2at|3c10|5torch|6caffe2)", name)]
    assert not [name for name in names if name.startswith("_Py")]
    foreign = [n for n in names if n.startswith("_Z") and not re.match(r"_Z(St|N[KVO]*S|T[ISTV]|n[aw]|d[al])", n)]
    assert not foreign


# ---- layers ----


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_of_torch(path):
    included = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
    assert not [name for name in included if re.match(r"(torch|ATen|c10|Python|pybind11)", name) or "csrc" in name]
    if path.suffix == ".py":
        assert imported(path) <= {"triton", "__future__"}


@pytest.mark.parametrize("path", sources("csrc"), ids=lambda p: str(p.relative_to(ROOT)))
def test_operators_use_the_stable_abi_alone(path):
    included = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
    allowed = r"torch/(csrc/stable|csrc/inductor/aoti_torch/c|headeronly)/"
    assert not [n for n in included if re.match(r"(torch|ATen|c10)/", n) and not re.match(allowed, n)]
    if "host" in path.parts:
        assert not [name for name in included if name.startswith("torch/")]


def test_references_are_plain():
    """A reference needs no other module of the package when it is imported, but for one of plain data types."""
    for path in sources("pyperf_dl/reference"):
        outer = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        for name in (node.module for node in outer if node.level > 1):
            assert imported(ROOT / "pyperf_dl" / f"{name}.py") <= sys.stdlib_module_names, path


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("family", env.families())
def test_a_family_has_all_its_files(family):
    files = HOST_FILES if (ROOT / "csrc" / "host" / f"{family}.cpp").exists() else FAMILY_FILES
    assert not [name.format(family) for name in files if not any(ROOT.glob(name.format(family)))]


# ---- environment variables ----


def test_every_environment_variable_is_documented():
    read = r"""(?:environ(?:\.get|\.setdefault)?|getenv)[\[(]\s*["'](PYPERF_\w+)"""
    files = [ROOT / "setup.py", *sources("pyperf_dl", "csrc", "kernels", "tools", "bench")]
    used = {name for path in files for name in re.findall(read, path.read_text())}
    documented = set(re.findall(r"^## `(PYPERF_\w+)`", (ROOT / "docs" / "env.md").read_text(), re.MULTILINE))
    assert used == documented
    assert len(used) <= 5
