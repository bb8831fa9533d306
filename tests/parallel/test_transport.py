"""Pipeline messages: every channel delivers in order, whatever the others do and however early receives are posted."""

import random
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.lower import lower
from dualpipe.program import Kind, Message, Send, Work
from dualpipe.schedules.dualpipe import dualpipe
from dualpipe.schedules.forward import forward_only
from parallel.mesh import Layout
from parallel.shared_memory import SharedMemory
from parallel.transport import Lanes, PipelineTransport, channels, lanes_of
from tests.ranks import run_ranks

LAYOUT = Layout(2, 2)
EACH = 6


def messages(kind: Kind) -> list[Message]:
    return [Message(kind, Work(1 if kind is Kind.ACTIVATION else 0, m)) for m in range(EACH)]


def content(message: Message, source: int) -> torch.Tensor:
    """What only this message of this rank of the world holds; not contiguous."""
    value = 1000 * source + 100 * list(Kind).index(message.kind) + message.work.microbatch
    return (torch.arange(6.0).view(3, 2) + 10000 * value).t()


def exchange(rank: int, seed: int, lanes: Lanes) -> tuple[list[bool], int]:
    """Both positions of a pipeline send to each other on both channels; their orders, and how early the receives are
    posted, are drawn. For every message in the order of waiting: whether it is the right one."""
    draw = random.Random(f"{seed}:{rank}")
    transport = PipelineTransport(LAYOUT, rank, torch.empty(2, 3), lanes=lanes)
    peer = 1 - LAYOUT.pipeline_index(rank)
    peer_rank = LAYOUT.rank(peer, LAYOUT.data_index(rank))
    window = {kind: draw.randint(1, EACH) for kind in Kind}
    posted, right = {kind: 0 for kind in Kind}, []

    def post(kind: Kind, until: int) -> None:
        for message in messages(kind)[posted[kind] : until]:
            transport.receive(message, peer)
        posted[kind] = max(posted[kind], min(until, EACH))

    early = draw.random() < 0.5
    if early:
        for kind in Kind:
            post(kind, window[kind])
    # An order that keeps that of each channel.
    kinds = [kind for kind in Kind for _ in range(EACH)]
    draw.shuffle(kinds)
    queues = {kind: iter(messages(kind)) for kind in Kind}
    for kind in kinds:
        message = next(queues[kind])
        transport.send(message, peer, content(message, rank))
    for kind in Kind:
        post(kind, window[kind])
    draw.shuffle(kinds)
    waited = {kind: 0 for kind in Kind}
    for kind in kinds:
        message = messages(kind)[waited[kind]]
        received = transport.wait(message, peer)
        right.append(torch.equal(received, content(message, peer_rank)))
        waited[kind] += 1
        post(kind, waited[kind] + window[kind])
    transport.flush()
    return right, transport.bytes_sent


def many(rank: int) -> list[tuple[list[bool], int]]:
    """By sockets, then by shared memory."""
    used = [(source, 1 - source, kind) for source in range(2) for kind in Kind]
    memory = SharedMemory([0] * LAYOUT.world_size, timedelta(seconds=60))
    lanes = lanes_of(memory, LAYOUT, rank, used)
    assert len(lanes.out) == len(lanes.into) == len(Kind)
    return [exchange(rank, seed, way) for way in (Lanes(), lanes) for seed in range(25)]


def test_every_channel_is_a_fifo_of_its_own() -> None:
    for results in run_ranks(many, LAYOUT.world_size):
        for right, bytes_sent in results:
            assert right == [True] * 2 * EACH
            assert bytes_sent == 2 * EACH * 6 * 4


def blocked(rank: int) -> bool:
    """A gradient is waited for first though an activation of the same peer was sent before it, and its receive is
    posted late; the sender waits for an answer in between, so that nothing but separate channels lets this end."""
    transport = PipelineTransport(Layout(2), rank, torch.empty(2, 3))
    activation, gradient = messages(Kind.ACTIVATION)[0], messages(Kind.GRADIENT)[0]
    if rank == 0:
        transport.receive(gradient, 1)
        transport.send(activation, 1, content(activation, 0))
        transport.send(gradient, 1, content(gradient, 0))
        received = transport.wait(gradient, 1)
        transport.flush()
        return torch.equal(received, content(gradient, 1))
    transport.receive(gradient, 0)
    received = [transport.wait(gradient, 0)]
    transport.send(gradient, 0, content(gradient, 1))
    transport.receive(activation, 0)
    received.append(transport.wait(activation, 0))
    transport.flush()
    return all(map(torch.equal, received, [content(gradient, 0), content(activation, 0)]))


def test_no_message_waits_behind_one_of_another_channel() -> None:
    assert run_ranks(blocked, 2) == [True, True]


@pytest.mark.parametrize("shape,dtype", [((3, 3), torch.float32), ((2, 3), torch.bfloat16)])
def test_a_message_of_another_shape_never_leaves(shape: tuple[int, int], dtype: torch.dtype) -> None:
    transport = PipelineTransport(Layout(2), 0, torch.empty(2, 3))
    with pytest.raises(AssertionError):
        transport.send(messages(Kind.ACTIVATION)[0], 1, torch.empty(shape, dtype=dtype))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 4, 8]), st.integers(0, 3))
def test_channels_are_those_of_every_send_and_serve_validation_too(ranks: int, more: int) -> None:
    program = lower(dualpipe(ranks, 2 * ranks + 2 * more))
    used = channels([program])
    assert len(set(used)) == len(used)
    sends = {(r, s.peer, s.message.kind) for r, slots in enumerate(program.slots) for s in slots if isinstance(s, Send)}
    assert set(used) == sends
    # A validation pass runs on the same transport, so it may use no channel that training has not.
    assert (
        set(channels([lower(forward_only(dualpipe(ranks, 2 * ranks), 2), training=False)] if ranks == 2 else []))
        <= sends
    )
    assert set(channels([lower(forward_only(dualpipe(ranks, 2 * ranks), ranks + 2 * more), training=False)])) <= sends
