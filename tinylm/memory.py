"""Counting memory."""

import resource
import sys


def peak_rss() -> int:
    """The largest resident memory that this process has had, in bytes."""
    if sys.platform == "linux":  # ru_maxrss counts what the parent had before exec; VmHWM starts with this program
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
