"""The machine: what it is, which cores this process may use, and what happens to it while a model is timed.

What a system does not offer is left out, not guessed: pinning, memory and interruptions are read where there is a way to.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import coppice

PACKAGES = (
    "numpy",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "torch",
    "torchvision",
    "timm",
    "lightning-fabric",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tf2onnx",
    "ai-edge-litert",
    "openvino",
)


def versions() -> dict[str, str]:
    """Versions of everything that can change a number in the result."""
    found = {"coppice": coppice.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(threads: int) -> dict[str, Any]:
    return {"system": platform.platform(), "cpu": cpu_model(), "cores": os.cpu_count() or 1, "threads": threads}


def cpu_model() -> str:
    """The marketing name of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on (a container often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def pinning() -> Iterator[Callable[[int], None]]:
    """A function that keeps every thread of this process on its first ``n`` cores; they are free again afterwards.

    Every thread, because a runtime's pool outlives the setting that it was made in. Linux only; elsewhere it does nothing.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir() or not hasattr(os, "sched_setaffinity"):
        yield lambda n: None
        return
    allowed = sorted(os.sched_getaffinity(0))

    def pin(n: int) -> None:
        for task in tasks.iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
                os.sched_setaffinity(int(task.name), allowed[:n])

    try:
        yield pin
    finally:
        pin(len(allowed))


def interruptions() -> int:
    """How often the system has taken a core away from this process; 0 where it does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class Growth:
    """``bytes``: by how much the process had grown at most while the block ran; None where the system does not tell.

    Memory that the process holds from before and uses again does not show: what it can give back is given back first.
    """

    bytes: int | None = None


@contextlib.contextmanager
def growth() -> Iterator[Growth]:
    found = Growth()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _reset_peak()
    yield found
    if before is not None:
        found.bytes = max(0, _status("VmHWM") - before)


def _reset_peak() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
