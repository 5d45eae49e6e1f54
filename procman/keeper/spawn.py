"""From a request to a running child: fork, the child's own set-up, exec.

The parent only forks: every step that can fail or block (a dead network disk, a full process table of the user) happens
in the child, which reports it through a pipe that exec closes. What the steps mean is decided by the supervisor; here
are only numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

SYS_CLONE3 = 435
"""The same on every architecture (clone3(2))."""

CLONE_INTO_CGROUP = 0x200000000

_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)

OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)
"""RLIMIT_NOFILE as procmand was started with it. The keeper raises its own; programs get this one."""

SPARE_TO_FORK, SPARE_TO_HOLD = 32, 64
"""So many descriptors stay free when the keeper starts a child, or takes one more to hold: it must always be able to
start a supervisor, to reap and to signal. The copies that a new supervisor gets of what is held come on top."""

SIGNAL_SET_BYTES = 128
"""Of a sigset_t, in glibc and musl."""

EVERY_SIGNAL = signal.valid_signals()

_RLIMITS = {
    "open_files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "core": resource.RLIMIT_CORE,
}


REPORT_MAX = 4096
"""Bytes of a report: a pipe takes as many at once (PIPE_BUF, pipe(7))."""

MESSAGE_MAX = 300
"""Characters of a reason. JSON makes up to 12 bytes of one."""


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument. Raises OSError."""
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def trim_heap() -> None:
    """Give the kernel back what importing modules took for a moment, a megabyte: malloc_trim(3). Only glibc can."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def block_signals() -> bytes:
    """Block every signal; returns the mask that was there, for `set_signal_mask`.

    (signal.pthread_sigmask makes 64 enums each time, which took a tenth of the keeper's part of a restart.)
    """
    before = ctypes.create_string_buffer(SIGNAL_SET_BYTES)
    _libc.pthread_sigmask(signal.SIG_BLOCK, b"\xff" * SIGNAL_SET_BYTES, before)
    return before.raw


def set_signal_mask(mask: bytes) -> None:
    """Let `mask`, a sigset_t (sigsetops(3)), be the signals that are blocked. All zero blocks none."""
    _libc.pthread_sigmask(signal.SIG_SETMASK, mask, None)


def fork_child(set_up_and_exec: Callable[[int], NoReturn], cgroup: str = "") -> tuple[int, int]:
    """Fork, into `cgroup` where one is given. The child runs `set_up_and_exec(report_fd)`, with all signals blocked.

    The parent gets the pid and the read end of the report pipe: it ends empty when exec has succeeded, otherwise it
    holds what `failure` made. Raises OSError.
    """
    read_end, write_end = os.pipe()
    # A signal between fork and exec would run the keeper's handlers in the child and be lost to the program.
    _changed_signals()
    before = block_signals()
    try:
        pid = fork(cgroup)
        if pid == 0:
            try:
                set_up_and_exec(write_end)
            finally:
                os._exit(127)
    except OSError:
        os.close(read_end)
        raise
    finally:
        set_signal_mask(before)
        os.close(write_end)
    os.set_blocking(read_end, False)
    return pid, read_end


def fork(cgroup: str) -> int:
    """fork(2); the child is born in the cgroup v2 folder `cgroup`, or enters it, or stays where it is if neither works.

    To be born there (clone3(2), Linux 5.7) costs nothing; to enter it makes the kernel wait for all processors, which
    took 12 ms on a busy machine. A container's seccomp profile may forbid clone3. Returns 0 in the child.
    """
    if cgroup:
        try:
            return _clone_into(cgroup)
        except OSError:
            pass
    pid = os.fork()
    if pid == 0 and cgroup:
        with contextlib.suppress(OSError):  # not delegated after all: the descendants are found without it
            _write(f"{cgroup}/cgroup.procs", "0")
    return pid


def _clone_into(cgroup: str) -> int:
    folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
        # set_tid_size, cgroup.
        arguments = struct.pack("@11Q", CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, folder)
        # What os.fork() does around the system call. PyDLL keeps the GIL: one thread goes in, one comes out.
        ctypes.pythonapi.PyOS_BeforeFork()
        pid = int(_python.syscall(SYS_CLONE3, arguments, ctypes.c_size_t(len(arguments))))
        number = ctypes.get_errno()
        if pid == 0:
            ctypes.pythonapi.PyOS_AfterFork_Child()
            return 0
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    finally:
        os.close(folder)
    if pid < 0:
        raise OSError(number, os.strerror(number))
    return pid


def become(request: Mapping[str, Any], held: Mapping[str, int], report: int) -> NoReturn:
    """In the child: do all that `request` asks for, then exec. A failure is reported as step, errno and message."""
    step = "start"
    try:
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, 3 + len(request.get("listen") or []))
        for name, action in _steps(request, held):
            step = name
            action()
        step = "exec"
        _exec(request)
    except BaseException as error:  # noqa: BLE001 - whatever it is: only the parent can be told
        os.write(report, json.dumps(failure(step, error)).encode())
    os._exit(127)


def failure(step: str, error: BaseException) -> dict[str, Any]:
    """Why there will be no program: the fields of the "failed" message. As JSON they fit in REPORT_MAX bytes."""
    number = error.errno or errno.EINVAL if isinstance(error, OSError) else errno.EINVAL
    text = error.strerror or str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    short = text if len(text) <= MESSAGE_MAX else text[: MESSAGE_MAX - 1] + "…"
    return {"step": step, "errno": number, "message": short}


def read_report(text: bytes) -> dict[str, Any]:
    """What the child said by its report pipe: the fields of `failure`, whatever arrived."""
    try:
        report = json.loads(text)
        return {"step": str(report["step"]), "errno": int(report["errno"]), "message": str(report["message"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {"step": "report", "errno": errno.EPROTO, "message": f"not readable: {text[:MESSAGE_MAX]!r}"}


def reset_signals() -> None:
    """Give every signal its default action, as the manual page of execve(2) lets a program expect it."""
    for number in _changed_signals():
        signal.signal(number, signal.SIG_DFL)


@functools.cache
def _changed_signals() -> list[signal.Signals]:
    """Those that have another action than the default one here. Asked once, in the parent: it is slow."""
    possible = EVERY_SIGNAL - {signal.SIGKILL, signal.SIGSTOP}
    return [number for number in possible if signal.getsignal(number) is not signal.SIG_DFL]


def _steps(request: Mapping[str, Any], held: Mapping[str, int]) -> list[tuple[str, Callable[[], object]]]:
    limits: Mapping[str, Any] = request.get("limits") or {}
    uid, gid = request.get("uid"), request.get("gid")
    steps: list[tuple[str, Callable[[], object]]] = [("setsid", os.setsid), ("signals", reset_signals)]
    if "rss" in request:
        steps.append(("rss", functools.partial(_tag, int(request["rss"]))))
    chosen = [(name, functools.partial(_limit, name, int(limits[name]))) for name in _RLIMITS if name in limits]
    steps += [step for step in chosen if step[0] != "open_files"]
    if "nice" in limits:
        steps.append(("nice", lambda: os.setpriority(os.PRIO_PROCESS, 0, int(limits["nice"]))))
    if "oom_score_adj" in limits:
        steps.append(("oom_score_adj", lambda: _write("/proc/self/oom_score_adj", str(limits["oom_score_adj"]))))
    if limits.get("cpu_affinity"):
        steps.append(("cpu_affinity", lambda: os.sched_setaffinity(0, limits["cpu_affinity"])))
    # Until here files are opened, among all that the keeper holds: its own limit must be in force. From here on the
    # program's is, and may be far below the numbers that are in use.
    steps.append(("descriptors", lambda: _place_descriptors(request, held)))
    steps.append(("open_files", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, OPEN_FILES)))
    steps += [step for step in chosen if step[0] == "open_files"]
    if uid is not None:
        steps.append(("groups", lambda: os.setgroups(request.get("groups") or [])))
    if gid is not None:
        steps.append(("group", lambda: os.setresgid(gid, gid, gid)))
    if uid is not None:
        steps.append(("user", lambda: os.setresuid(uid, uid, uid)))
    steps += [
        ("umask", lambda: os.umask(int(request.get("umask", 0o022)))),
        ("directory", lambda: _enter_folder(request.get("directory") or "/")),
    ]
    if limits.get("no_new_privileges"):
        steps.append(("no_new_privileges", lambda: prctl(PR_SET_NO_NEW_PRIVS, 1)))
    return steps


def _enter_folder(path: str) -> None:
    try:
        os.chdir(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {path!r}") from error


def _limit(name: str, value: int) -> None:
    """Set soft and hard limit; -1 is no limit. Raises OSError for more than the hard limit without CAP_SYS_RESOURCE."""
    what = _RLIMITS[name]
    wanted = resource.RLIM_INFINITY if value < 0 else value
    try:
        resource.setrlimit(what, (wanted, wanted))
    except (ValueError, PermissionError) as error:
        raise OSError(errno.EPERM, f"{value} is more than the hard limit of the daemon") from error


def _tag(value: int) -> None:
    """Set the soft RLIMIT_RSS, of which nothing but `tree` takes notice."""
    hard = resource.getrlimit(resource.RLIMIT_RSS)[1]
    if hard in (resource.RLIM_INFINITY, -1) or hard >= value:
        resource.setrlimit(resource.RLIMIT_RSS, (value, hard))


def clear_tag(base: int) -> None:
    """Take a tag, which is more than `base`, off this process: whoever started procmand from within a program must not
    have it ended with that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_RSS)
    if base < soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_RSS, (hard, hard))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _place_descriptors(request: Mapping[str, Any], held: Mapping[str, int]) -> None:
    """stdin from /dev/null, stdout and stderr as asked, listeners from 3 on (sd_listen_fds(3)); the rest closes on
    exec. What the program `needs` besides must be held, too: the other end of something that it will use."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    names = [request.get("stdout"), request.get("stderr"), *(name for _, name in request.get("listen") or [])]
    missing = [name for name in (*names, *(request.get("needs") or [])) if name is not None and name not in held]
    if missing:
        raise OSError(errno.EBADF, f"no descriptor is held as {missing[0]!r}")
    wanted = [null, *(null if name is None else held[name] for name in names)]
    above = len(wanted)  # none of the copies may lie where one of them has to go
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in wanted]
    for target, fd in enumerate(copies):
        os.dup2(fd, target)


def _exec(request: Mapping[str, Any]) -> NoReturn:
    environment: dict[str, str] = {**request["env"], **request.get("marks", {})}
    listen = request.get("listen") or []
    if listen:
        environment["LISTEN_FDS"] = str(len(listen))
        environment["LISTEN_FDNAMES"] = ":".join(name.replace(":", "_") for name, _ in listen)
        environment["LISTEN_PID"] = str(os.getpid())
    if "pid_mark" in request:
        environment[request["pid_mark"]] = str(os.getpid())
    argv: list[str] = request["argv"]
    set_signal_mask(bytes(SIGNAL_SET_BYTES))
    try:
        os.execvpe(argv[0], argv, environment)
    except FileNotFoundError as error:
        where = "" if "/" in argv[0] else f" in PATH {environment.get('PATH', os.defpath)}"
        raise OSError(errno.ENOENT, f"no such program or interpreter: {argv[0]!r}{where}") from error
    except NotADirectoryError as error:
        raise OSError(errno.ENOENT, f"no such program: {argv[0]!r}") from error
    except PermissionError as error:
        what = f"{argv[0]!r}" if "/" in argv[0] else f"{argv[0]!r} in PATH {environment.get('PATH', os.defpath)}"
        raise OSError(errno.EACCES, f"{what} can't be executed by this user: it, or what leads to it") from error
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {argv[0]!r}") from error


def become_supervisor(command: list[str], wire: int) -> NoReturn:
    """In the child: exec `command` with the number of the wire's descriptor as one more argument."""
    reset_signals()
    os.setsid()  # what a terminal or `timeout` sends to the whole group is for the keeper, who passes it on
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive us and decide about programs that it can't reach
    os.set_inheritable(wire, True)
    resource.setrlimit(resource.RLIMIT_NOFILE, OPEN_FILES)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execv(command[0], [*command, str(wire)])


def close_on_exec() -> None:
    """What our own parent left open is ours alone; 0 to 2 are open afterwards, so that no other file gets their
    numbers."""
    while (null := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:
            pass  # that of listdir itself


def name() -> str:
    """What `ps -o comm` calls this process (proc(5))."""
    try:
        with open("/proc/self/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


def set_name(name: str) -> None:
    """The reverse: at most 15 bytes."""
    with contextlib.suppress(OSError):
        _write("/proc/self/comm", name)


def room_for(count: int) -> bool:
    """Whether this process can open `count` descriptors more, nearly: the kernel gives the lowest free number."""
    try:
        lowest = os.dup(2)
    except OSError:
        return False
    os.close(lowest)
    return lowest + count < resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_files() -> None:
    """Let this process hold as many descriptors as the hard limit allows."""
    hard = OPEN_FILES[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
