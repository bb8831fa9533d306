"""What torch's elastic agent asks when it starts the ranks of an attempt: the node's place, and a store.

The launcher in place 0 holds the store, for the agents and the ranks of this one attempt: ranks that meet the addresses
which the ranks before them left in a store connect to nobody.
"""

from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from launch.nodes.member import Member
from launch.nodes.roster import Roster

BACKEND = "dualpipe"
STORE_SECONDS = 30.0
"""How long an agent waits for another to come to the store, or to answer in it."""


class PlaceRendezvous(RendezvousHandler):
    """The place that ``member`` has in ``attempt``, of so many ``nodes``. ``address``: of this host, as other nodes
    reach it."""

    def __init__(self, member: Member, attempt: int, nodes: int, address: str) -> None:
        self._member, self._attempt, self._nodes, self._address = member, attempt, nodes, address

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        place, timeout = self._member.place, timedelta(seconds=STORE_SECONDS)
        if place is None:
            raise RendezvousClosedError
        if place == 0:
            store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            host, port = self._address, store.port
            self._member.look(lambda roster: self._publish(roster, host, port))
        else:
            host, port = self._published()
            store = TCPStore(host, port, is_master=False, timeout=timeout)
        return RendezvousInfo(store, place, self._nodes, RendezvousStoreInfo(host, port))

    def _publish(self, roster: Roster, host: str, port: int) -> None:
        if roster.attempt == self._attempt:
            roster.address = (host, port)

    def _published(self) -> tuple[str, int]:
        while (view := self._member.view).attempt == self._attempt and not self._member.given_up and not view.closed:
            if view.address is not None:
                return view.address
            self._member.wait()
        raise RendezvousClosedError

    def is_closed(self) -> bool:
        return self._member.view.attempt != self._attempt

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return str(self._attempt)

    def shutdown(self) -> bool:
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    handler = parameters.config["handler"]
    assert isinstance(handler, PlaceRendezvous)
    return handler


def register() -> None:
    """Let torch's launcher find it. Once more, it does no harm."""
    rendezvous_handler_registry.register(BACKEND, _create)
