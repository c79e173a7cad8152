"""The most memory that this process has used since it was last asked."""

import re
import sys
from pathlib import Path

STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def read_status() -> dict[str, int]:
    """Bytes by name of what Linux tells of this process's memory; {} on another system."""
    if not STATUS.exists():
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", STATUS.read_text(), re.M)}


def peak_resident() -> int:
    """The most bytes of memory that this process has had, on Linux since `reset_peak`."""
    import resource

    # Not the resource's number where there is another: it counts what the parent had when it started this process.
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return read_status().get("VmHWM", used)


def reset_peak() -> None:
    """Begins anew from what the process has now; does nothing where the system cannot do that."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return
