"""The server that all ranks of a node are forked from: it has imported torch, so that eight of them do not import it
eight times. It starts no thread and touches no GPU, and outlives the ranks, which are started again within a second.

It outlives a launcher that is killed, too, and its ranks, and then ends as the last: so it is the one to take along the
folder for temporary files, where its socket is (``last_out.py``)."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import tempfile
from collections.abc import Iterator
from types import TracebackType

import psutil

from launch.config import ConfigError
from launch.stop import heeded

_SOCKET_BYTES = 103
"""Of the path of a socket, at most: 104 with the zero at its end on macOS, 108 on Linux."""
_SOCKET = "/pymp-xxxxxxxx/listener-xxxxxxxx"
"""Where multiprocessing puts its socket below the folder for temporary files."""
_SHORT = "/tmp"
FOLDER = "DUALPIPE_TEMPORARY"
"""The variable that names the folder to a server."""


class ForkServer:
    """A fork server that is deaf to what a terminal or a service manager sends to the whole group: with its end the
    ranks would end, which finish their step first. A context manager; raises ConfigError when its socket has no place.

    Signals are blocked, not ignored: what reaches a rank between its fork and its first line waits for it.
    """

    def __init__(self) -> None:
        self._servers: set[psutil.Process] = set()

    def __enter__(self) -> "ForkServer":
        multiprocessing.set_forkserver_preload(["launch.trainer", "launch.last_out"])
        with _folder_for_sockets():
            os.environ[FOLDER] = self.folder
        self.ensure_running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:  # it may be about to fork a rank that nobody waits for
            with contextlib.suppress(psutil.NoSuchProcess):
                server.kill()

    @property
    def folder(self) -> str:
        """For temporary files; made once, and removed when this process ends."""
        return str(multiprocessing.util.get_temp_dir())

    def ensure_running(self) -> None:
        """Start the server, or another one when it was ended."""
        stopping = {*heeded(), signal.SIGQUIT}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
        try:
            multiprocessing.resource_tracker.ensure_running()  # the server's own helper, as deaf as it has to be
            others = set(psutil.Process().children())
            signal.pthread_sigmask(signal.SIG_BLOCK, stopping)  # starting the helper let some of them in again
            multiprocessing.forkserver.ensure_running()
            self._servers |= set(psutil.Process().children()) - others
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end_if_it_hides_an_end(self) -> None:
        """Kill a server that a signal has stopped while a rank of it is over: nobody would ever hear of that."""
        for server in self._servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                if server.status() == psutil.STATUS_STOPPED and any(map(_is_over, server.children())):
                    server.kill()

    def ranks(self) -> set[psutil.Process]:
        """The processes that it forked and that are not over."""
        found: set[psutil.Process] = set()
        for server in self._servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update(server.children())
        return found


def _is_over(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def _folder_for_sockets() -> Iterator[None]:
    """Temporary files go where the path of a socket is not too long. Raises ConfigError when there is no such place."""
    own = tempfile.gettempdir()
    if len(os.fsencode(own + _SOCKET)) <= _SOCKET_BYTES:
        yield
        return
    if not os.access(_SHORT, os.W_OK | os.X_OK):
        most = _SOCKET_BYTES - len(_SOCKET)
        raise ConfigError(f"TMPDIR={own} must be at most {most} bytes long where {_SHORT} cannot be written: sockets")
    before, tempfile.tempdir = tempfile.tempdir, _SHORT
    try:
        yield
    finally:
        tempfile.tempdir = before
