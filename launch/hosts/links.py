"""The links of an emulated cluster: a bridge that every node is plugged into, and token buckets that cap them.

A node sends to others through ``eth0``, whose queue is one token bucket; what others send to it waits in a second one,
at its port of the bridge, so that a link is full duplex and many senders share one receiver's. Ranks of one node talk
over its loopback device, even where they use the node's own address; its queue is the third token bucket.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

NETWORK = "10.77.0"
"""Addresses exist in the cluster's own namespaces only, so that they collide with nothing outside."""
MTU = 9000
"""Headers take 1 % of a cap; with Ethernet's 1500 bytes it would be 4 %."""
_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LOWEST, _HIGHEST = 10**6, 10**12


class LinkError(RuntimeError):
    """The cluster could not be made; one line with what the kernel or the tool said."""


@dataclass(frozen=True)
class Rate:
    """A bandwidth, in bits per second."""

    bits_per_s: int

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """``"400mbit"``, ``"1.28gbit"``. Raises ValueError with the rule, to stand behind the key and the value."""
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(kbit|mbit|gbit)", text)
        rate = round(float(found[1]) * _UNITS[found[2]]) if found else 0
        if not _LOWEST <= rate <= _HIGHEST:
            raise ValueError("must be a rate from 1mbit to 1000gbit, such as 400mbit (units: kbit, mbit, gbit)")
        return cls(rate)

    def token_bucket(self) -> str:
        """The words of a ``tc`` queue that lets so much pass.

        The bucket holds two of the largest packets that TCP hands down (64 KiB, before segmentation), or they would be
        cut up one by one, and at least a millisecond's worth, or a late timer would lose bandwidth. The queue holds 50
        milliseconds' worth, which a sender rarely fills: TCP keeps a few packets of each connection in it.
        """
        bytes_per_s = self.bits_per_s // 8
        burst, limit = max(2 << 16, bytes_per_s // 1000), max(1 << 20, bytes_per_s // 20)
        return f"tbf rate {self.bits_per_s}bit burst {burst} limit {limit}"


def address(node: int) -> str:
    """The IPv4 address of a node."""
    return f"{NETWORK}.{node + 1}"


def connect(switch: int, nodes: Sequence[int], inter_node: Rate | None, intra_node: Rate | None) -> None:
    """Plug nodes into the switch and cap their links; each is given by a process in its network namespace. A cap of
    None leaves the link as fast as the machine. Raises LinkError."""
    plugs, caps = ["link add name bridge type bridge", "link set bridge up"], []
    for n, pid in enumerate(nodes):
        plugs += [
            f"link add name port{n} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {pid}",
            f"link set port{n} master bridge up",
        ]
        if inter_node:
            caps.append(f"qdisc add dev port{n} root {inter_node.token_bucket()}")
    _batch("ip", switch, plugs)
    _batch("tc", switch, caps)
    for n, pid in enumerate(nodes):
        _batch("ip", pid, ["link set lo up", f"address add {address(n)}/24 dev eth0", "link set eth0 up"])
        rates = {"eth0": inter_node, "lo": intra_node}
        _batch("tc", pid, [f"qdisc add dev {of} root {rate.token_bucket()}" for of, rate in rates.items() if rate])


def _batch(program: str, pid: int, lines: Sequence[str]) -> None:
    """Run lines of ``ip`` or ``tc`` in the network namespace of a process."""
    if not lines:
        return
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", program, "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
    if done.returncode:
        said = "; ".join(done.stderr.split("\n")).strip("; ")
        raise LinkError(f"{program} could not do one of {', '.join(map(repr, lines))}: {said}")
