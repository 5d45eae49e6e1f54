"""Which socket of a SO_REUSEPORT group gets a new connection: a few instructions of classic BPF that we attach to it.

It knows sockets and their places in the group. It must not know what they are for. A program is of the group, not of
the socket that it is attached by, and goes with the last of them; it needs no privilege (socket(7),
SO_ATTACH_REUSEPORT_CBPF). The place of a socket is the order of listen(); when one leaves, the last one takes its
place. A place that does not exist means: as if there were no program.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import struct
from collections.abc import Sequence

SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_ATTACH_REUSEPORT_CBPF = 26, 27, 51

# Instructions (linux/filter.h, linux/bpf_common.h): code, jump if true, jump if false, operand.
_LOAD_BYTE, _LOAD_HALF, _SHIFT_RIGHT = 0x30, 0x28, 0x74
_JUMP, _JUMP_IF_EQUAL, _RETURN = 0x05, 0x15, 0x06
_JUMP_IF_SET, _SYN, _FLAGS, _SOURCE_PORT, _ALL = 0x45, 0x02, 13, 0, 0xFFFFFFFF  # of a TCP header; all of the packet
_LOAD_WORD, _JUMP_IF_NOT_LESS = 0x20, 0x35
_RANDOM = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM: a number of 32 bits
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: where the IP header begins
_IPV4_SOURCE_PORT, _IPV6_SOURCE_PORT = 20, 40  # after a header without options, as those of our own packets are

_Instruction = tuple[int, int, int, int]


def lead(sock: socket.socket, place: int) -> None:
    """From now on every new connection of the group of `sock` goes to the socket at `place`. Raises OSError."""
    _attach(sock, [(_RETURN, 0, 0, place)])


def lead_share(sock: socket.socket, share: float, place: int, others: int) -> None:
    """`share` (0 to 1) of the new connections goes to the socket at `place`, by chance, all others to the one at
    `others`. Raises OSError."""
    _attach(sock, by_chance(share, place, others))


def lead_port(sock: socket.socket, port: int, place: int, others: int, share: float = 0.0) -> None:
    """A connection from the source port `port` goes to the socket at `place`, of all others `share` to the one that is
    not at `others` (as `lead_share` has it): so we can ask one of two servers alone. Raises OSError."""
    _attach(sock, from_port(port, place, by_chance(share, 1 - others, others)))


def deafen(sock: socket.socket) -> None:
    """Whoever is led to `sock` is not heard, and gets no answer: TCP asks again a second later. Raises OSError."""
    _attach(sock, [(_RETURN, 0, 0, 0)], SO_ATTACH_FILTER)


def hear_only(sock: socket.socket, port: int = 0) -> None:
    """Who connects to `sock` from another source port than this is not heard, as `deafen` has it. Raises OSError."""
    code = [
        (_LOAD_BYTE, 0, 0, _FLAGS),
        (_JUMP_IF_SET, 0, 3, _SYN),
        (_LOAD_HALF, 0, 0, _SOURCE_PORT),
        (_JUMP_IF_EQUAL, 1, 0, port),
        (_RETURN, 0, 0, 0),
        (_RETURN, 0, 0, _ALL),
    ]
    _attach(sock, code, SO_ATTACH_FILTER)


def hear_all(sock: socket.socket) -> None:
    """The reverse; can be done again, and without it."""
    with contextlib.suppress(FileNotFoundError):  # ENOENT: it has no filter
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def by_chance(share: float, place: int, others: int) -> list[_Instruction]:
    """The instructions of `lead_share`. Pure."""
    if share <= 0:
        return [(_RETURN, 0, 0, others)]
    return [
        (_LOAD_WORD, 0, 0, _RANDOM),
        (_JUMP_IF_NOT_LESS, 1, 0, min(round(share * 2**32), 2**32 - 1)),
        (_RETURN, 0, 0, place),
        (_RETURN, 0, 0, others),
    ]


def from_port(port: int, place: int, otherwise: Sequence[_Instruction]) -> list[_Instruction]:
    """A connection from the source port `port` goes to `place`; what becomes of others `otherwise` says. Pure."""
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 2, 0, 6),
        (_LOAD_HALF, 0, 0, _NETWORK_HEADER + _IPV4_SOURCE_PORT),
        (_JUMP, 0, 0, 1),
        (_LOAD_HALF, 0, 0, _NETWORK_HEADER + _IPV6_SOURCE_PORT),
        (_JUMP_IF_EQUAL, 0, 1, port),
        (_RETURN, 0, 0, place),
        *otherwise,
    ]


def waiting(sock: socket.socket) -> bool:
    """Whether a connection waits in the accept queue of the listening `sock`, TCP or Unix."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _attach(
    sock: socket.socket, program: Sequence[_Instruction], option: int = SO_ATTACH_REUSEPORT_CBPF
) -> None:
    """struct sock_fprog: the count, and the address of the instructions."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    filtering = struct.pack("@HP", len(program), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, option, filtering)
