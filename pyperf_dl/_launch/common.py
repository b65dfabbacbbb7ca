"""What every launcher asks of a device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton


def check_device(t: torch.Tensor, kernel: Any) -> None:
    if t.device.type == "cpu" and isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            "pyperf_dl: the triton backend needs a GPU; CPU tensors work only in Triton's interpreter, "
            "with TRITON_INTERPRET=1 set before python starts"
        )


def on_device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if t.device.type == "cpu" else torch.accelerator.device_index(t.device.index)
