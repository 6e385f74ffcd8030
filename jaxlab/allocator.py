"""glibc's malloc, told to keep the memory that a training step on CPU frees.

A step takes about a gigabyte of temporaries and gives it back. By default glibc
returns blocks of that size to the kernel, and the next step pays for every page
again: a quarter of its time (docs/benchmarks.md). The settings are read once, when
a process starts, so a script sets them by starting itself again.
"""

import glob
import os
import sys
from collections.abc import Mapping

SWITCH = "JAXLAB_ALLOCATOR"
"""environment variable: "default" leaves malloc alone; "tuned" once it is set up"""

TUNABLES = {
    "glibc.malloc.hugetlb": "1",  # ask for huge pages (where they are on "madvise")
    "glibc.malloc.mmap_threshold": str(8 << 30),  # no mapping of its own per block
    "glibc.malloc.trim_threshold": str(16 << 30),  # nothing back to the kernel
    "glibc.malloc.top_pad": str(256 << 20),  # grow in pieces worth a huge page
}
"""glibc manual, "Memory Allocation Tunables"; unknown ones are ignored by glibc"""

ACCELERATORS = (
    "/dev/nvidia[0-9]*",
    "/dev/kfd",
    "/dev/accel*",
    "/dev/vfio/[0-9]*",
    "/dev/dxg",
)


def tune() -> None:
    """Starts this process again under `TUNABLES`, where that makes training faster.

    Call it first thing in a script: what ran before runs twice. Process number,
    arguments and interpreter options stay; settings of the user's win. Returns
    without doing anything on a second call, off Linux with glibc, where the
    platform will not be CPU, or with `JAXLAB_ALLOCATOR=default`.
    """
    environment = tuned(os.environ)
    if environment is None or not (sys.executable and sys.orig_argv):
        return
    if not (_glibc() and cpu_only(os.environ)):
        return
    # Not orig_argv[0]: a bare "python" could be another one on the PATH.
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, environment)


def tuned(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment with the settings; None if it has decided already."""
    if environment.get(SWITCH) in ("default", "tuned"):
        return None
    asked = environment.get("GLIBC_TUNABLES", "")
    names = {item.partition("=")[0] for item in asked.split(":")}
    ours = [f"{k}={v}" for k, v in TUNABLES.items() if k not in names]
    joined = ":".join([asked, *ours] if asked else ours)
    return {**environment, "GLIBC_TUNABLES": joined, SWITCH: "tuned"}


def _glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):  # musl knows no such name
        return False


def cpu_only(environment: Mapping[str, str]) -> bool:
    """Whether JAX will run on CPU, told without importing it."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not any(glob.glob(pattern) for pattern in ACCELERATORS)
