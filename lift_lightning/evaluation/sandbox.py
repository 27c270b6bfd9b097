"""Run a program that a model wrote: in a process of its own, with limits on time and memory and without a network.

It is no prison. It keeps a program that is wrong from doing harm by accident; one that is meant to do harm belongs into
a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Literal

Outcome = Literal["passed", "failed", "timeout"]

_NO_NETWORK = 97  # exit status
# Given what it is to print at the end: a program that leaves early has not come to the end of its checks.
_STARTER = f"""
import ctypes, os, resource, sys
seconds, mebibytes, password = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
libc = ctypes.CDLL(None, use_errno=True)
user, network = 0x10000000, 0x40000000
if libc.unshare(user | network) and libc.unshare(network):
    sys.exit({_NO_NETWORK})
source = sys.stdin.read()
answer = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nowhere, stream)
sys.argv[1:] = []
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (mebibytes * 2**20,) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
exec(compile(source, "program", "exec"), {{"__name__": "__main__"}})
os.write(answer, password.encode())
"""


class SandboxError(RuntimeError):
    """The machine does not let a program be run as it has to be."""


def run_program(source: str, *, seconds: float = 5.0, mebibytes: int = 1024) -> Outcome:
    """Whether a Python program comes to its end without an exception.

    Args:
        source: the program, checks and all. What it prints is thrown away; it runs in an empty folder that is removed.
        seconds: of wall time, and rounded up of the processor's.
        mebibytes: of address space.

    Raises:
        SandboxError: if the process cannot be cut off from the network; Linux alone has what it takes.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"programs that a model wrote are run on Linux only, this is {sys.platform}")
    password = secrets.token_hex(8)
    arguments = [str(int(-(-seconds // 1))), str(mebibytes), password]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _STARTER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(source.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            # Whatever it has started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == _NO_NETWORK:
        raise SandboxError(
            "this machine does not let a process cut itself off from the network (it has no user namespaces), so "
            "programs that a model wrote are not run: use a machine or container that does"
        )
    if process.returncode == -signal.SIGXCPU:
        return "timeout"
    return "passed" if said == password.encode() else "failed"
