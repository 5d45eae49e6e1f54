"""Lets another process decide about some of its system calls, then becomes a command: SOCKET NUMBERS COMMAND...

NUMBERS of system calls, joined by commas. The descriptor on which they are asked for (seccomp_unotify(2)) is sent to
the Unix socket SOCKET. All descendants are under the same rule.
"""

from __future__ import annotations

import array
import ctypes
import os
import socket
import struct
import sys

PR_SET_NO_NEW_PRIVS = 38
SET_MODE_FILTER, NEW_LISTENER = 1, 8
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
USER_NOTIF, ALLOW = 0x7FC00000, 0x7FFF0000
SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}[os.uname().machine]


def main() -> None:
    where, numbers, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = [int(number) for number in numbers.split(",")]
    # The number of the call stands first in struct seccomp_data. Each comparison jumps to the last instruction.
    code = [struct.pack("HBBI", LOAD, 0, 0, 0)]
    code += [struct.pack("HBBI", JUMP_EQUAL, len(wanted) - place, 0, each) for place, each in enumerate(wanted)]
    code += [struct.pack("HBBI", RETURN, 0, 0, ALLOW), struct.pack("HBBI", RETURN, 0, 0, USER_NOTIF)]
    text = ctypes.create_string_buffer(b"".join(code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(text))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(where)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        listener = libc.syscall(SYS_SECCOMP, SET_MODE_FILTER, NEW_LISTENER, program)
        if listener < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
        os.close(listener)
    os.execv(command[0], command)


main()
