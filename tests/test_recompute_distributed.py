"""Plans under DDP and FSDP2: two processes on a CPU, with gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("recompute_distributed.py")


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_have_the_gradients_of_the_model_without_a_plan(kind, tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(SCRIPT), kind, str(tmp_path / "plan.json"),
        ],
        capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        assert f"tensors are equal on process {rank}" in done.stdout
