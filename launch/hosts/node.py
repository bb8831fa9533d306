"""The first process of a node, alone in new namespaces; runs by its path, with the standard library only.

    node.py CONTROL NAME HOSTS CMD ...

CONTROL is the descriptor of a socket to whoever made the node. One byte goes out when the node has its name and can be
given links. Then a byte comes in for every signal that CMD is to get: the first, whatever it is, starts it. When the
other end closes, because the cluster is done or its maker was killed, this process ends. It is process 1 of its own
process namespace, so the kernel then kills every other process there is in it, and with the last of them go the
namespaces, their links and queues.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

NOT_FOUND, NOT_RUNNABLE = 127, 126


def become(name: str, hosts: str) -> None:
    """Take a host name, and a file of host names that replaces /etc/hosts in this mount namespace alone. The file lives
    in memory: nothing on disk has to be removed."""
    socket.sethostname(name)
    subprocess.run(["mount", "-t", "tmpfs", "hosts", "/sys"], check=True)
    Path("/sys/hosts").write_text(hosts)
    subprocess.run(["mount", "--bind", "/sys/hosts", "/etc/hosts"], check=True)
    subprocess.run(["umount", "/sys"], check=True)


def run(command: list[str], control: socket.socket) -> int:
    """Run a command, hand signals on to its process group, bury the orphans of the namespace. Returns its exit status,
    128 + N when signal N ended it."""
    arrivals, wakeup = os.pipe()
    os.set_blocking(arrivals, False)
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # without a handler of Python's own, no wakeup
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what runs in its background with it ignored
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUNNABLE
    while True:
        readable, _, _ = select.select([control.fileno(), arrivals], [], [])
        if arrivals in readable:
            os.read(arrivals, 4096)
            status = _bury(child.pid)
            if status is not None:
                return status
        if control.fileno() in readable:
            asked = control.recv(1)
            if not asked:
                return 128 + signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, asked[0])


def _bury(child: int) -> int | None:
    """Collect every process that has ended; the exit status of ``child`` if it is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> int:
    number, name, hosts, *command = sys.argv[1:]
    control = socket.socket(fileno=int(number))
    become(name, hosts)
    control.send(b"!")
    return run(command, control) if control.recv(1) and command else 0


if __name__ == "__main__":
    sys.exit(main())
