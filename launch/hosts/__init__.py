"""``dualpipe hosts``: a cluster on one machine, to launch on several nodes without having them.

Every node is a set of Linux namespaces of its own, with a host name, an address, and links of a limited bandwidth; the
command given runs in each, with torchrun's cluster options in its environment. See docs/hosts.md.
"""

import argparse
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from launch import output, stop
from launch.hosts.cluster import Cluster
from launch.hosts.links import NETWORK, LinkError, Rate
from launch.invocation import CLUSTER, program_words

USER_ERROR = 2
FAILED = 1
LARGEST = {"--nodes": 254, "--ranks-per-node": 256}
"""A node's address is the last byte of an IPv4 network's, and each rank is a process."""
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "util-linux"}
"""What is called, and the Debian package that has it."""
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
"""Bits of CapEff in /proc/self/status: to make links, and to make namespaces (Linux, capability.h)."""

_EPILOG = """\
CMD runs once on every node. Hosts are called node0, node1, ... and know each other by name; torchrun needs no option,
because it finds them in its environment (PET_NNODES, PET_NPROC_PER_NODE, PET_RDZV_BACKEND,
PET_RDZV_ENDPOINT, PET_RDZV_ID). The folder of this Python comes first on the PATH.

A cap is that of a whole node: what all its ranks together send to other nodes, and receive from them (--inter-node),
and what they send to each other (--intra-node). Units: kbit, mbit, gbit (per second, powers of 1000).

When CMD fails on one node, the others get SIGTERM, and what is left 10 seconds later is killed. SIGINT, SIGTERM and
SIGHUP are passed on to CMD. However this command ends, nothing of the cluster is left.

example, two nodes with the H800's ratio of NVLink to InfiniBand, 160 to 50:
  dualpipe hosts --nodes 2 --ranks-per-node 4 --inter-node 400mbit --intra-node 1280mbit \\
      -- torchrun -m launch.train configs/tiny-cpu.yaml train.steps=20"""


class UsageError(ValueError):
    """Arguments that the command does not understand, or a machine that cannot do it; one line that says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when CMD succeeded on every node; that of the first node that failed; 128 + N where signal N
    ended it; 2 for bad arguments or a machine that lacks what it takes; 1 where the cluster could not be made."""
    output.prepare()
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        options, command = _parse(words)
        lacking = missing()
        if lacking:
            raise UsageError(lacking)
        environment = _environment(os.environ, words[: words.index("--")])
        if shutil.which(command[0], path=environment["PATH"]) is None:
            raise UsageError(f"{command[0]!r} is not a program that can be found")
        stop.end_at_once()
        with Cluster(options.nodes, options.ranks_per_node, command, environment) as cluster:
            cluster.connect(options.inter_node, options.intra_node)
            return cluster.run()
    except (UsageError, LinkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR if isinstance(error, UsageError) else FAILED
    except stop.Stopped as stopped:
        print("stopped before the nodes were ready", file=sys.stderr)
        return 128 + stopped.number


def missing() -> str | None:
    """Why this machine, or this user, cannot have a cluster of namespaces; None where they can."""
    if sys.platform != "linux":
        return f"dualpipe hosts needs Linux, for its network namespaces; this is {sys.platform}"
    without = [name for name in PROGRAMS if shutil.which(name) is None]
    if without:
        packages = ", ".join(dict.fromkeys(PROGRAMS[name] for name in without))
        return f"dualpipe hosts needs {', '.join(without)}: install {packages}"
    (held,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "CapEff" in line]
    if any(not int(held, 16) >> bit & 1 for bit in CAPABILITIES.values()):
        return f"dualpipe hosts needs root: {' and '.join(CAPABILITIES)} (a container has them with --privileged)"
    return None


def is_node() -> bool:
    """Whether this process runs in a node of a cluster, with a network of its own."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith(f"{NETWORK}.")
    except OSError:
        return False


def parser() -> argparse.ArgumentParser:
    command = _Parser(
        prog="dualpipe hosts",
        usage="dualpipe hosts --nodes N --ranks-per-node R [--inter-node RATE] [--intra-node RATE] -- CMD ...",
        description="Run CMD on a cluster made of this machine: nodes with addresses and capped links of their own.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--nodes", metavar="N", required=True, help="nodes to make")
    command.add_argument("--ranks-per-node", metavar="R", required=True, help="processes that torchrun starts on each")
    command.add_argument("--inter-node", metavar="RATE", help="cap of a node's link to the others, each way (no cap)")
    command.add_argument("--intra-node", metavar="RATE", help="cap of all traffic inside a node (no cap)")
    return command


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options and CMD, which stands behind the first ``--``. Raises UsageError."""
    cut = words.index("--") if "--" in words else len(words)
    options, command = parser().parse_args(words[:cut]), words[cut + 1 :]
    for key, largest in LARGEST.items():
        name = key[2:].replace("-", "_")
        given = getattr(options, name)
        if not (given.isascii() and given.isdecimal() and len(given) < 6 and 1 <= int(given) <= largest):
            raise UsageError(f"{key}={given[:40]} must be a whole number from 1 to {largest}")
        setattr(options, name, int(given))
    for key in ("--inter-node", "--intra-node"):
        name = key[2:].replace("-", "_")
        given = getattr(options, name)
        try:
            setattr(options, name, None if given is None else Rate.parse(given))
        except ValueError as error:
            raise UsageError(f"{key}={given[:40]} {error}") from None
    if not command:
        raise UsageError("the command to run on every node is missing: give it behind --")
    return options, command


def _environment(outside: Mapping[str, str], options: Sequence[str]) -> dict[str, str]:
    """What CMD gets to see on every node, ``options`` of this command among it. CMD's output goes through a pipe, where
    Python would hold it back. Raises UsageError."""
    try:
        here = Path.cwd()
    except OSError as error:
        raise UsageError(f"the working directory must be there: {error.strerror}") from None
    made_by = f"{program_words(sys.argv[0], outside, here, 'hosts')} {shlex.join(options)}"
    path = os.pathsep.join([os.path.dirname(sys.executable), outside.get("PATH", os.defpath)])
    return {**outside, "PATH": path, "PYTHONUNBUFFERED": "1", CLUSTER: made_by}
