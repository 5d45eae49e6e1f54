"""The wire between keeper and supervisor: in whatever pieces it arrives, messages and descriptors come out whole."""

from __future__ import annotations

import array
import gc
import json
import os
import resource
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procman.keeper.wire import HEADER, MAX_DESCRIPTORS, MAX_MESSAGE, Message, Wire, WireClosed, WireError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.dictionaries(st.text(), VALUES, max_size=4)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """Closed exactly once: a second time would raise, or close somebody else's; never would be counted here."""
    gc.collect()
    before = open_files()
    yield
    gc.collect()
    assert open_files() == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def pair() -> tuple[Wire, Wire]:
    ours, theirs = socket.socketpair()
    return Wire(ours), Wire(theirs)


def packet(message: Message, descriptors: int = 0) -> bytes:
    body = json.dumps(message).encode()
    return HEADER.pack(len(body), descriptors) + body


def receive_all(wire: Wire, count: int) -> list[tuple[Message, list[int]]]:
    found: list[tuple[Message, list[int]]] = []
    for _ in range(10000):
        if len(found) >= count:
            break
        found += wire.receive()
    return found


def close(*descriptors: int) -> None:
    for fd in descriptors:
        os.close(fd)


def same_file(one: int, other: int) -> bool:
    first, second = os.fstat(one), os.fstat(other)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


@settings(max_examples=60, deadline=None)
@given(st.lists(MESSAGES, max_size=6))
def test_messages_arrive_as_they_were_sent(messages: list[Message]) -> None:
    left, right = pair()
    for message in messages:
        left.send(message)
    assert [message for message, _ in receive_all(right, len(messages))] == messages
    assert right.receive() == []
    left.close()
    right.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=3), st.data())
def test_pieces_of_any_size(messages: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(packet, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    ours, theirs = socket.socketpair()
    right = Wire(theirs)
    found: list[Message] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        ours.sendall(stream[start:end])
        found += [message for message, _ in right.receive()]
    assert found == messages
    right.close()
    ours.close()


def test_byte_by_byte_with_descriptors() -> None:
    ours, theirs = socket.socketpair()
    right = Wire(theirs)
    read_end, write_end = os.pipe()
    found: list[tuple[Message, list[int]]] = []
    for message, descriptors in (({"op": "a"}, []), ({"op": "b"}, [read_end, write_end]), ({"op": "c"}, [read_end])):
        stream = packet(message, len(descriptors))
        socket.send_fds(ours, [stream[:1]], descriptors)
        for at in range(1, len(stream)):
            found += right.receive()
            ours.send(stream[at : at + 1])
        found += right.receive()
    assert [message["op"] for message, _ in found] == ["a", "b", "c"]
    assert [len(descriptors) for _, descriptors in found] == [0, 2, 1]
    for got, sent in zip([fd for _, fds in found for fd in fds], [read_end, write_end, read_end], strict=True):
        assert same_file(got, sent)
        assert not os.get_inheritable(got)
        close(got)
    close(read_end, write_end)
    right.close()
    ours.close()


def test_descriptors_stay_with_their_message_when_sends_are_partial() -> None:
    left, right = pair()
    pipes = [os.pipe() for _ in range(20)]
    filling = "x" * 200_000  # more than a socket takes: every message goes in pieces
    for number, (read_end, write_end) in enumerate(pipes):
        left.send({"number": number, "filling": filling}, [read_end, write_end] if number % 3 else [])
    assert left.waiting
    found: list[tuple[Message, list[int]]] = []
    while len(found) < len(pipes):
        left.flush()
        found += right.receive()
    assert not left.waiting
    for number, (message, descriptors) in enumerate(found):
        assert message["number"] == number
        assert len(descriptors) == (2 if number % 3 else 0)
        assert all(same_file(got, sent) for got, sent in zip(descriptors, pipes[number], strict=False))
        close(*descriptors)
    close(*(fd for ends in pipes for fd in ends))
    left.close()
    right.close()


def test_a_peer_that_does_not_read_never_blocks_the_sender() -> None:
    left, right = pair()
    read_end, write_end = os.pipe()
    for number in range(200):
        left.send({"number": number, "filling": "x" * 20_000}, [read_end])
    assert left.waiting
    close(read_end, write_end)  # the copies of the wire are its own
    left.close()  # with most of it unsent
    right.close()


def test_a_large_message() -> None:
    """argv and environment may take 2 MB (execve(2)), which JSON makes more."""
    left, right = pair()
    message = {"argv": ["\N{EURO SIGN}" * 1000] * 1000, "env": {"LONG": "x" * 1_000_000, "BYTES": "\udcff"}}
    left.send(message)
    found: list[tuple[Message, list[int]]] = []
    while not found:
        left.flush()
        found = right.receive()
    assert found == [(message, [])]
    left.close()
    right.close()


def test_too_large_to_send() -> None:
    left, right = pair()
    with pytest.raises(WireError, match="too large"):
        left.send({"x": "x" * (MAX_MESSAGE + 1)})
    with pytest.raises(WireError, match="too large"):
        left.send({}, [0] * (MAX_DESCRIPTORS + 1))
    left.send({"still": "works"})
    assert right.receive() == [({"still": "works"}, [])]
    left.close()
    right.close()


def test_a_descriptor_that_is_none() -> None:
    left, right = pair()
    with pytest.raises(WireError, match="descriptor"):
        left.send({}, [0, 1_000_000])
    left.send({"still": "works"})
    assert right.receive() == [({"still": "works"}, [])]
    left.close()
    right.close()


def test_the_end() -> None:
    left, right = pair()
    left.send({"op": "last words"})
    left.close()
    assert right.receive() == [({"op": "last words"}, [])]
    with pytest.raises(WireClosed):
        right.receive()
    with pytest.raises(WireClosed):
        right.send({"op": "too late"}, [0])
    assert not right.waiting
    right.close()


def test_last_words_can_be_read_after_a_send_has_failed() -> None:
    left, right = pair()
    left.send({"op": "last words"})
    right.send({"op": "unread"})
    left.close()
    with pytest.raises(WireClosed):
        right.send({"op": "too late"})
    assert right.receive() == [({"op": "last words"}, [])]
    right.close()


def fed(stream: bytes, descriptors: int = 0) -> None:
    """Feeds a wire, until it says that it is closed, or nonsense. Anything else is an error."""
    ours, theirs = socket.socketpair()
    right = Wire(theirs)
    read_end, write_end = os.pipe()
    if stream:
        socket.send_fds(ours, [stream], [read_end] * descriptors)
    ours.close()
    with pytest.raises(WireError):
        while True:
            for message, received in right.receive():
                assert isinstance(message, dict)
                close(*received)
    right.close()
    close(read_end, write_end)


BODIES: list[bytes] = [
    *(b"", b"{", b"[]", b"7", b"null", b'"op"', b"\xff\xfe", b"{}{}", b'{"op":', b"nan"),
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a":' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:12]))
def test_a_body_that_is_no_message(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    right = Wire(theirs)
    stream = memoryview(HEADER.pack(len(body), 0) + body)
    with pytest.raises(WireError) as raised:
        while True:
            stream = stream[ours.send(stream[:60_000]) :]
            assert right.receive() == []
            assert stream, "it should have been refused"
    assert not isinstance(raised.value, WireClosed)
    right.close()
    ours.close()


def test_descriptors_of_what_came_with_nonsense_are_closed() -> None:
    fed(packet({"op": "hold"}, 2) + HEADER.pack(2, 0) + b"[]", 2)
    fed(packet({"op": "hold"}, 2) + packet({"op": "more than there are"}, 1), 2)
    fed(packet({"op": "none was announced"}), 3)
    fed(HEADER.pack(MAX_MESSAGE + 1, 0), 1)
    fed(HEADER.pack(10, MAX_DESCRIPTORS + 1) + b"{}", 1)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 3))
def test_garbage_is_a_wire_error_and_nothing_else(stream: bytes, descriptors: int) -> None:
    fed(stream, descriptors)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 4), st.integers(0, 2))
def test_garbage_in_a_good_header(body: bytes, announced: int, descriptors: int) -> None:
    fed(struct.pack("!IB", len(body), announced) + body, descriptors)


def test_no_descriptor_free() -> None:
    """MSG_CTRUNC: the kernel drops what has no place. It must not be taken for the descriptor of a later message."""
    left, right = pair()
    read_end, write_end = os.pipe()
    left.send({"op": "hold"}, [read_end, write_end, read_end])
    left.send({"op": "log"}, [write_end])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.dup(read_end)]
    while fillers[-1] < taken:  # no gap below may be free
        fillers.append(os.dup(read_end))
    highest = fillers.pop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
    try:
        ((first, none),) = right.receive()  # the kernel ends a call behind descriptors
        ((second, received),) = right.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (first, none, second) == ({"op": "hold"}, [], {"op": "log"})
    os.write(received[0], b"x")
    assert os.read(read_end, 1) == b"x"
    close(read_end, write_end, highest, *fillers, *received)
    left.close()
    right.close()


def test_no_descriptor_free_to_copy_one() -> None:
    left, right = pair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(WireError, match="can't copy"):
            left.send({"op": "held"}, [0, 1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    left.close()
    right.close()


def test_ancillary_data_that_is_no_descriptor_is_ignored() -> None:
    ours, theirs = socket.socketpair()
    right = Wire(theirs)
    credentials = array.array("i", [os.getpid(), os.geteuid(), os.getegid()])
    ancillary: list[Any] = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
    ours.sendmsg([packet({"op": "hello"})], ancillary)
    assert right.receive() == [({"op": "hello"}, [])]
    right.close()
    ours.close()


def test_descriptors_that_belong_to_no_message_do_not_pile_up() -> None:
    """A message that says that it has none came with some: they waited for the next one, for ever."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    wire = Wire(ours)
    socket.send_fds(theirs, [HEADER.pack(2, 0) + b"{}"], [0, 1, 2])
    with pytest.raises(WireError, match="belong to no message"):
        wire.receive()
    wire.close()
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_of_a_message_that_never_comes_do_not_pile_up() -> None:
    ours, theirs = socket.socketpair()
    wire = Wire(ours)
    theirs.sendall(HEADER.pack(1000, 1))
    with pytest.raises(WireError, match="belong to no message"):
        for _ in range(3):
            socket.send_fds(theirs, [b" "], [2] * MAX_DESCRIPTORS)
            wire.receive()
    wire.close()
    theirs.close()
