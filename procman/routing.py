"""Which socket of a SO_REUSEPORT group gets a new connection: a few instructions of classic BPF that we attach to it.

It knows sockets and their places in the group. It must not know what they are for. A program is of the group, not of
the socket that it is attached by, and goes with the last of them; it needs no privilege (socket(7),
SO_ATTACH_REUSEPORT_CBPF). The place of a socket is the order of listen(); when one leaves, the last one takes its
place. A place that does not exist means: as if there were no program.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
from collections.abc import Sequence

SO_ATTACH_REUSEPORT_CBPF = 51

# Instructions (linux/filter.h, linux/bpf_common.h): code, jump if true, jump if false, operand.
_LOAD_BYTE, _LOAD_HALF, _SHIFT_RIGHT = 0x30, 0x28, 0x74
_JUMP, _JUMP_IF_EQUAL, _RETURN = 0x05, 0x15, 0x06
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: where the IP header begins
_IPV4_SOURCE_PORT, _IPV6_SOURCE_PORT = 20, 40  # after a header without options, as those of our own packets are

_Instruction = tuple[int, int, int, int]


def lead(sock: socket.socket, place: int) -> None:
    """From now on every new connection of the group of `sock` goes to the socket at `place`. Raises OSError."""
    _attach(sock, [(_RETURN, 0, 0, place)])


def lead_port(sock: socket.socket, port: int, place: int, others: int) -> None:
    """A connection from the source port `port` goes to the socket at `place`, all others to the one at `others`: so we
    can ask a server that nobody else shall meet yet. Raises OSError."""
    _attach(
        sock,
        [
            (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
            (_SHIFT_RIGHT, 0, 0, 4),
            (_JUMP_IF_EQUAL, 2, 0, 6),
            (_LOAD_HALF, 0, 0, _NETWORK_HEADER + _IPV4_SOURCE_PORT),
            (_JUMP, 0, 0, 1),
            (_LOAD_HALF, 0, 0, _NETWORK_HEADER + _IPV6_SOURCE_PORT),
            (_JUMP_IF_EQUAL, 0, 1, port),
            (_RETURN, 0, 0, place),
            (_RETURN, 0, 0, others),
        ],
    )


def waiting(sock: socket.socket) -> bool:
    """Whether a connection waits in the accept queue of the listening `sock`, TCP or Unix."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _attach(sock: socket.socket, program: Sequence[_Instruction]) -> None:
    """struct sock_fprog: the count, and the address of the instructions."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    filtering = struct.pack("@HP", len(program), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, filtering)
