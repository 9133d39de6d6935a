"""Runs a command that the kernel kills when the process that started it dies, however that one dies.

``python tether.py PARENT_PID COMMAND...`` arranges this and becomes the command (same process id). Run as a file, so
that nothing else is imported on the way. Where the system has no such arrangement (other than Linux) the command is
simply run: then a parent killed with SIGKILL leaves it behind, and ``kvpilot up`` says so when it starts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
SUPPORTED = sys.platform == "linux"


def tether(parent: int) -> None:
    """Has the kernel send this process SIGKILL when its parent ends.

    SIGKILL because nothing may linger; nothing is lost by it, since jobs outlive any process. The arrangement holds
    for the thread that forked, so that thread has to live as long as the process is wanted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the arrangement stood
        os._exit(1)


if __name__ == "__main__":
    if SUPPORTED:
        tether(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
