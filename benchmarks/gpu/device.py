"""The device that the suite runs on: is there a GPU, and what must be known of it to read the figures."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from gkp.errors import BackendMissingError
from gkp.runtime.environment import fingerprint, version

_PACKAGES = ("triton", "polygraphy")


def require_gpu() -> tuple[int, int]:
    """Compute capability of the GPU that PyTorch uses. BackendMissingError when there is none."""
    if not torch.cuda.is_available():
        raise BackendMissingError("PyTorch finds no NVIDIA GPU here, and this measures one",
                                  "run it on a machine with a GPU, its driver and a CUDA build of PyTorch")
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


def environment(device: str) -> dict[str, Any]:
    """As everywhere, and GPU, capability, driver, CUDA; the GPU's entries are null on a CPU."""
    gpu, common = device == "cuda", fingerprint()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    return {
        **common,
        "gpu": properties.name if properties else None,
        "capability": ".".join(map(str, require_gpu())) if gpu else None,
        "memory_gib": round(properties.total_memory / 2**30, 1) if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "tf32_convolutions": bool(torch.backends.cudnn.allow_tf32),
        "packages": {**common["packages"], **{package: v for package in _PACKAGES if (v := version(package))}},
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver, by its own tool; None where that does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.split()
    return lines[0][:40] if lines else None
