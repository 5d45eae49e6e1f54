"""The built-in WSGI server: `python -m procman.wsgi shop:app`, or `VENV/bin/python .../procman/wsgi.py --site DIR`.

waitress does HTTP and PEP 3333. This module adds what a supervised server needs: sockets that somebody else holds
(sd_listen_fds(3)), word that it serves (sd_notify(3)), an access log, clear words about an application that can't be
imported, and above all a stop that no client notices:

  1. On SIGTERM or SIGINT it accepts no more. An inherited listener is left alone: it belongs to others too. A socket of
     its own is emptied, then closed; a connection that is made between the two is reset, so a held one is better.
  2. Every request that has arrived, even in part, or arrives on an open connection is answered, the last one of a
     connection with `Connection: close` (RFC 9112 section 9.6). Then it sends FIN and waits for the client's own close,
     for bytes that nobody reads would make the kernel send RST, which can destroy an answer on its way.
  3. A keep-alive connection that is silent for `--idle-grace` is closed if no byte of it is unread. What remains is a
     request that is on the wire in that moment: clients repeat it (RFC 9112 section 9.3.1).
  4. It ends when no connection is left and no thread works: status 0. After `--drain-timeout` it ends anyway: status 1.

It must not know procman: it runs inside the application's virtualenv, so it is one file that imports the standard
library and waitress only, and nothing of it may depend on who started it.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import json
import logging
import os
import re
import resource
import select
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any
from wsgiref.util import FileWrapper


def _arrange_search_path(argv: Sequence[str]) -> None:
    """The application's folder first, `--site` last. For a script Python puts the script's folder first: its modules
    (`config`, `server`) would hide the application's."""
    here = os.path.dirname(os.path.realpath(__file__))
    if sys.path and os.path.realpath(sys.path[0]) == here:
        del sys.path[0]
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    for position, word in enumerate(argv):
        if word == "--site":
            sys.path.extend(argv[position + 1 : position + 2])
        elif word.startswith("--site="):
            sys.path.append(word.partition("=")[2])


if __name__ == "__main__":
    _arrange_search_path(sys.argv[1:])  # before the next lines: waitress may be found by --site alone

from waitress import wasyncore  # noqa: E402
from waitress.adjustments import Adjustments  # noqa: E402
from waitress.channel import ClientDisconnected, HTTPChannel  # noqa: E402
from waitress.parser import HTTPRequestParser, ParsingError  # noqa: E402
from waitress.server import BaseWSGIServer, TcpWSGIServer, UnixWSGIServer  # noqa: E402
from waitress.task import ErrorTask, Task, ThreadedTaskDispatcher, WSGITask  # noqa: E402
from waitress.trigger import trigger  # noqa: E402

Environ = dict[str, Any]
Application = Callable[..., Iterable[bytes]]

CUT, WRONG_USE, NOT_LOADED = 1, 2, 3  # exit statuses; CUT is also "no socket to listen on"
OUT, ERR = 1, 2  # file descriptors: an application may replace sys.stdout and sys.stderr
ELSEWHERE = {"threads": "--threads", **dict.fromkeys(("host", "port", "listen", "sockets", "unix_socket"), "--bind")}
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # accept(2): try again later


class Refused(Exception):
    """This server can't start. The text is for the user, `status` is the exit status."""

    def __init__(self, message: str, status: int = CUT) -> None:
        super().__init__(message)
        self.status = status


# --- What it says --------------------------------------------------------------------------------------------------


def _write(fd: int, text: str) -> None:
    """One write(2), so that lines of several threads and processes stay whole. A dead reader breaks nothing."""
    try:
        os.write(fd, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def _say(text: str) -> None:
    _write(ERR, f"procman.wsgi: {text}\n")


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 256))} | {ord("\\"): "\\\\"}
_QUOTED = _CONTROL | {ord('"'): '\\"'}
_harmless = re.compile(r"[ !#-\[\]-~]*").fullmatch  # nothing to translate: five times as fast


class _Errors(logging.Handler):
    """waitress' own messages, and tracebacks of the application, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        trace = "" if error is None or "procman_logged" in error.__dict__ else _user_traceback(error)
        _write(ERR, f"procman.wsgi: {record.getMessage().translate(_CONTROL)}\n{trace}")


class _QueueLog:
    """What the task dispatcher takes for its logger: it warns for each request that waits, we once in ten seconds."""

    last = float("-inf")

    def warning(self, text: str, depth: int) -> None:
        """`depth` requests wait for a thread."""
        if time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            _say(f"all threads are busy: {text % depth} (--threads, or more processes)")


# Not from getLogger(): an application's logging.config.dictConfig() switches off every logger that it does not name.
_log = logging.Logger("procman.wsgi", logging.WARNING)  # noqa: LOG001 - see above
_log.addHandler(_Errors())


def _user_traceback(error: BaseException) -> str:
    """The traceback without the frames of servers and importlib above the application's; the last ten frames."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and "importlib" not in file and f"{os.sep}waitress{os.sep}" not in file:
            break
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace, limit=-10))


def _field(text: str, limit: int) -> str:
    """`text` for a quoted field of the access log: nothing in it can end the field or the line."""
    if len(text) <= limit and _harmless(text):
        return text or "-"
    return text.translate(_QUOTED)[:limit].rstrip("\\")


_second = (0, "")  # the last second that was asked for, and its text: strftime is slow


def access_line(
    *, remote: str, request: str, status: str, size: int, referer: str, agent: str, milliseconds: float
) -> str:
    """A line of the access log: the "combined" format of Apache and nginx, then the duration.

    It is at most 4096 bytes long (PIPE_BUF), so that processes which share a pipe can't mix their lines: see pipe(7).
    """
    global _second
    now = int(time.time())
    if _second[0] != now:
        _second = (now, time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(now)))
    quoted = f'"{_field(request, 2400)}" {status[:3]} {size} "{_field(referer, 700)}" "{_field(agent, 700)}"'
    return f"{_field(remote, 100)} - - [{_second[1]}] {quoted} {milliseconds:.1f}ms\n"


def _notify(path: str, state: str) -> None:
    """Tells the process at `path` (the NOTIFY_SOCKET; "" is nobody) our state, as sd_notify(3) says."""
    if not path:
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(2)
            sender.sendto(state.encode(), address)
    except OSError as error:
        _say(f"cannot send {state} to {path}: {error.strerror or error}")


# --- The application -----------------------------------------------------------------------------------------------


def load(spec: str) -> Any:
    """The object that `spec` names: "MODULE:NAME", "MODULE:NAME.NAME", or "MODULE:NAME()", which calls a factory.

    Raises Refused with a text that says what went wrong: no such module, no such name in it, or an error inside.
    """
    name, _, path = spec.partition(":")
    factory = path.endswith("()")
    path = path.removesuffix("()")
    where = f"cannot load {spec!r} in {os.getcwd()}"
    found: Any
    try:
        # Run as __main__, procman.wsgi may not be importable: the virtualenv need not have procman.
        found = sys.modules[__name__] if name == "procman.wsgi" else importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise Refused(f"{where}: there is no module {error.name!r} there or on sys.path", NOT_LOADED) from error
        trace = _user_traceback(error).rstrip()
        raise Refused(f"{where}: importing {name!r} raised {_named(error)}\n{trace}", NOT_LOADED) from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            close = difflib.get_close_matches(part, dir(found), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            owner = repr(found)  # of a module: with its file
            raise Refused(f"{where}: {owner} has no {part!r}{hint}", NOT_LOADED) from error
    if factory:
        found = _call(found, (), spec, where)
    if not callable(found):
        raise Refused(f"{where}: it is {type(found).__name__!r}, which is not callable", NOT_LOADED)
    return found


def _call(factory: Any, arguments: tuple[Any, ...], spec: str, where: str) -> Any:
    try:
        return factory(*arguments)
    except (Exception, SystemExit) as error:
        trace = _user_traceback(error).rstrip()
        raise Refused(f"{where}: calling {spec!r} raised {_named(error)}\n{trace}", NOT_LOADED) from error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def load_all(app: str, middleware: Sequence[str]) -> Application:
    """The application inside its middleware; the first of `middleware` is the outermost. Raises Refused."""
    application = load(app)
    for spec in reversed(middleware):
        where = f"cannot load middleware {spec!r} in {os.getcwd()}"
        application = _call(load(spec), (application,), spec, where)
        if not callable(application):
            raise Refused(f"{where}: it returned {type(application).__name__!r}, which is not callable", NOT_LOADED)
    return application  # type: ignore[no-any-return]


def request_logging(app: Application, slow_seconds: float = 1.0) -> Application:
    """WSGI middleware (`--middleware procman.wsgi:request_logging`): logs requests that fail or are slow.

    A request that raises, or is answered with 5xx, is an error; one that takes `slow_seconds` or more is a warning.
    They go to the logger "procman.request" of the standard library, so the application's logging configuration applies;
    without one they are on stderr. An exception is logged with its traceback, and passed on.
    """
    log = logging.getLogger("procman.request")

    def logged(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        began = time.perf_counter()
        status = ""

        def start(text: str, *rest: Any) -> Any:
            nonlocal status
            status = text
            return start_response(text, *rest)

        def done(error: Exception | None = None) -> None:
            seconds = time.perf_counter() - began
            what = f"{environ['REQUEST_METHOD']} {environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
            what = what.translate(_CONTROL)
            if error is not None:
                log.error("%s raised %s after %.3f s", what, type(error).__name__, seconds, exc_info=error)
                if log.isEnabledFor(logging.ERROR):
                    error.__dict__["procman_logged"] = True  # the server need not print it again
            elif status.startswith("5"):
                log.error("%s was answered %s after %.3f s", what, status, seconds)
            elif seconds >= slow_seconds:
                log.warning("%s took %.3f s (%s)", what, seconds, status)

        try:
            body = app(environ, start)
        except Exception as error:
            done(error)
            raise
        if isinstance(body, list | tuple) or type(body) is environ.get("wsgi.file_wrapper"):
            done()
            return body  # as it is: the server knows its length, or sends the file by itself
        return _Watched(body, done)

    return logged


class _Watched:
    """An application's iterable that tells `done` its end or its error, once."""

    def __init__(self, body: Iterable[bytes], done: Callable[..., None]) -> None:
        self.body = body
        self.iterator: Iterator[bytes] | None = None
        self.done: Callable[..., None] | None = done

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if self.iterator is None:
                self.iterator = iter(self.body)
            return next(self.iterator)
        except StopIteration:
            raise
        except Exception as error:
            self._tell(error)
            raise

    def close(self) -> None:
        """The server is done with it (PEP 3333)."""
        try:
            if hasattr(self.body, "close"):
                self.body.close()
        except Exception as error:
            self._tell(error)
            raise
        self._tell()

    def _tell(self, *error: Exception) -> None:
        done, self.done = self.done, None
        if done is not None:
            done(*error)


# --- Sockets -------------------------------------------------------------------------------------------------------


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that were passed to this very process: sd_listen_fds(3), from descriptor 3 on.

    Takes the variables out of `environ`, so that no child believes they are for it. Raises Refused for a descriptor
    that is no listening stream socket.
    """
    count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if not count:
        return []
    if pid != str(os.getpid()):
        _say(f"LISTEN_FDS is for process {pid or 'unknown'}, not for this one ({os.getpid()}): ignored")
        return []
    if not count.isascii() or not count.isdigit():
        raise Refused(f"LISTEN_FDS={count!r} is no number")
    sockets = []
    for fd in range(3, 3 + int(count)):
        try:
            sock = socket.socket(fileno=fd)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        except OSError as error:
            raise Refused(f"descriptor {fd} of LISTEN_FDS={count} is no socket: {error.strerror}") from error
        if not listens or sock.type != socket.SOCK_STREAM:
            raise Refused(f"descriptor {fd} of LISTEN_FDS={count} is no listening stream socket")
        os.set_inheritable(fd, False)
        sockets.append(sock)
    return sockets


def bound_sockets(bind: str, mode: int) -> list[socket.socket]:
    """New sockets bound to "HOST:PORT", "[::1]:PORT", ":PORT" (all addresses) or "unix:/path" (with file mode `mode`).

    A host name may have several addresses. They do not listen yet. Raises Refused.
    """
    try:
        if bind.startswith("unix:"):
            return [_bound(socket.AF_UNIX, bind[len("unix:") :], mode=mode)]
        host, colon, port = bind.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535 or (":" in host and not re.fullmatch(r"\[.*\]", host)):
            raise Refused(f"--bind {bind}: expected HOST:PORT, [IPV6]:PORT, :PORT or unix:/path", WRONG_USE)
        if not host and socket.has_dualstack_ipv6():
            return [_bound(socket.AF_INET6, ("::", int(port)), both=True)]
        found = socket.getaddrinfo(host.strip("[]") or "0.0.0.0", int(port), type=socket.SOCK_STREAM)
        return [_bound(family, address) for family, address in dict.fromkeys((each[0], each[4]) for each in found)]
    except OSError as error:
        raise Refused(f"cannot bind {bind}: {error.strerror or error}") from error


def _bound(family: int, address: Any, mode: int = 0, both: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            _remove_stale(address)
            umask = os.umask(0o777 & ~mode)
            try:
                sock.bind(address)
            finally:
                os.umask(umask)
            return sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _remove_if_same(path: str, file: os.stat_result) -> None:
    """Removes our socket file, unless a successor has put its own in the place."""
    try:
        if os.path.samestat(os.lstat(path), file):
            os.unlink(path)
    except OSError:
        pass


def _remove_stale(path: str) -> None:
    """Removes a socket file whose server is gone. bind(2) itself then complains about everything else."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1)
                probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass


# --- waitress, at a few points -------------------------------------------------------------------------------------
# tests/test_wsgi.py names each attribute of waitress that is used here, and fails when one is gone.


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """Answers 400 where waitress' own would raise, or hand the application a PATH_INFO without its slash."""

    path: str

    def parse_header(self, header_plus: bytes) -> None:
        """See HTTPRequestParser. Raises ParsingError, which becomes the 400."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of urlsplit and int
            raise ParsingError("Bad request line or Content-Length") from error
        if not self.path or (self.path == "*" and self.command == "OPTIONS"):
            self.path = "/"  # "GET http://host", and "OPTIONS *", which is about the whole server: REQUEST_URI has it
        elif not self.path.startswith("/"):
            raise ParsingError("Bad request target")


class _Answer(Task):  # type: ignore[misc]
    """What both kinds of answer share: the access log, HEAD, and the last answer of a draining connection."""

    sent = 0  # bytes of the body

    def __init__(self, channel: _Connection, request: Any) -> None:
        super().__init__(channel, request)
        # The request of an ErrorTask is a new, empty one when the application has raised; the true one is still first.
        self.asked = channel.requests[0] if channel.requests else request
        self.head = getattr(self.asked, "command", "") == "HEAD"

    def service(self) -> None:
        """Answers the request, and logs it. An error before the first byte is left to the answer that reports it."""
        answered = True
        try:
            super().service()
        except ClientDisconnected:
            self.status = "499"  # as nginx logs a client that has gone
            raise
        except Exception:
            answered = self.wrote_header
            raise
        finally:
            if answered and self.channel.server.service.access_log:
                self._log_access()

    def build_response_header(self) -> bytes:
        """The head of the response. waitress decides about keep-alive here, from the request's own header."""
        if self.close_on_finish or self.channel.is_last():
            self.request.headers["CONNECTION"] = "close"
        self.channel.held = super().build_response_header()
        if self.head:
            self.chunked_response = False  # no terminating chunk either
        return b""  # it goes out with the first piece of the body

    def write(self, data: bytes) -> None:
        """Writes a piece of the body, but not for HEAD (RFC 9110 section 9.3.2), where waitress would."""
        if isinstance(data, str):  # raised before the head is built, so that the answer is a 500
            raise TypeError("the application's body must be bytes, and not str (PEP 3333)")
        super().write(b"" if self.head else data)
        self.sent += len(data)
        held, self.channel.held = self.channel.held, b""
        self.channel.write_soon(held)  # there was no body to send it with

    def _log_access(self) -> None:
        asked, environ = self.asked, self.channel.environ
        headers = asked.headers
        line = "-"
        if hasattr(asked, "request_uri"):  # else it could not even be parsed
            line = f"{asked.command} {asked.request_uri} HTTP/{asked.version or '0.9'}"
        _write(
            OUT,
            access_line(
                remote=environ.get("REMOTE_ADDR", "") if environ else self.channel.addr[0],  # a proxy's header counts
                request=line,
                status=self.status,
                size=0 if self.head or not self.has_body else self.sent or self.content_length or 0,
                referer=headers.get("REFERER", ""),
                agent=headers.get("USER_AGENT", ""),
                milliseconds=(time.perf_counter() - self.channel.began) * 1000,
            ),
        )


class _ErrorAnswer(_Answer, ErrorTask):  # type: ignore[misc]
    pass


class _AppAnswer(_Answer, WSGITask):  # type: ignore[misc]
    _complete = False

    @property
    def complete(self) -> bool:
        """Whether start_response was called. waitress sets it in each such call, just before it reads the headers, and
        would keep the Content-Length of an answer that a second call with exc_info has replaced."""
        return self._complete

    @complete.setter
    def complete(self, value: bool) -> None:
        self._complete = value
        self.content_length = None

    def execute(self) -> None:
        """Calls the application. A SystemExit in a request is that request's error: waitress would never answer it."""
        try:
            super().execute()
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"the application raised {_named(error)}") from error

    def get_environment(self) -> Environ:
        """waitress' environ, with the addresses that PEP 3333 and RFC 3875 ask for."""
        environ: Environ = super().get_environment()
        environ.update(self.channel.addresses())
        environ["wsgi.multiprocess"] = self.channel.server.inherited  # its holder may give it to others as well
        if self.head:
            environ["wsgi.file_wrapper"] = FileWrapper  # waitress' own would send the file
        self.channel.environ = environ
        return environ


class _Connection(HTTPChannel):  # type: ignore[misc]
    task_class = _AppAnswer
    error_task_class = _ErrorAnswer
    parser_class = _Parser
    logger = _log

    will_close: bool
    environ: Environ | None = None  # of the request that is answered now, once the application has it
    began = 0.0  # when its answer began: perf_counter
    held = b""  # the head of a response that waits for the first piece of its body
    parted_at: float | None = None  # we have sent FIN and wait for the client's: monotonic
    silent_since: float | None = None  # while draining, monotonic

    _addresses: Environ | None = None

    def addresses(self) -> Environ:
        """The part of the environ that is the same for all requests of the connection."""
        if self._addresses is None:
            adj = self.server.adj
            if self.server.family == socket.AF_UNIX:  # RFC 3875 knows none: what a URL without a port implies
                mine, port = "localhost", "443" if adj.url_scheme == "https" else "80"
            else:
                try:
                    mine, port = self.socket.getsockname()[:2]
                except (OSError, AttributeError) as error:  # closed by the other thread
                    raise ClientDisconnected from error
                mine = f"[{mine}]" if ":" in mine else mine
            if adj.server_name != Adjustments.server_name:
                mine = adj.server_name  # by --set
            self._addresses = {"SERVER_NAME": mine, "SERVER_PORT": str(port), "SERVER_SOFTWARE": adj.ident or "procman"}
        return self._addresses

    def service(self) -> None:
        """Answers one request, in a thread of waitress. The drain waits for it even if the client goes meanwhile."""
        service = self.server.service
        service.busy.add(self)
        self.environ = None
        began = self.began = time.perf_counter()  # the next request of this connection may begin before we are back
        try:
            super().service()
        finally:
            service.count.add(time.perf_counter() - began)
            service.busy.discard(self)
            if service.draining or service.options.leave_waiting:
                self.server.pull_trigger()

    def received(self, data: bytes) -> bool:
        """Takes bytes of the client; throws them away after our FIN."""
        return self.parted_at is None and bool(super().received(data))

    def write_soon(self, data: Any) -> int:
        """Sends bytes, or a file. Head and body in one write are one packet, and one wake-up of the client."""
        if not data:
            return 0
        held, self.held = self.held, b""
        if held and isinstance(data, bytes) and len(data) < 65536:
            data = held + data
        elif held:
            super().write_soon(held)
        return int(super().write_soon(data))

    def handle_close(self) -> None:
        """Closes; but while draining, a connection that we end sends FIN and waits for the client's: see the module."""
        if self.will_close and self.server.service.draining and self.parted_at is None and self.connected:
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it is gone already
            else:
                self.will_close = False
                self.parted_at = time.monotonic()
                return
        super().handle_close()

    def has_unread(self) -> bool:
        """Whether bytes wait in the kernel that were not read yet."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except (OSError, AttributeError):  # none; or closed by the other thread
            return False

    def in_part(self) -> bool:
        """Whether a part of a request has come. A line end between requests is none (RFC 9112 section 2.2)."""
        request = self.request
        return request is not None and (request.headers_finished or bool(request.header_plus.strip()))

    def is_last(self) -> bool:
        """Whether the answer that begins now is the last one of this connection: draining, and no request behind it."""
        return self.server.service.draining and not (len(self.requests) > 1 or self.in_part() or self.has_unread())

    def pending(self) -> int:
        """The number of requests of this connection that have arrived, if only in part, and are not answered."""
        if self.parted_at is not None:
            return 0
        return len(self.requests) + self.in_part() or int(self.total_outbufs_len > 0 or self.has_unread())


class _Listening(BaseWSGIServer):  # type: ignore[misc]
    """A listening socket; waitress' class for its family comes behind this one."""

    channel_class = _Connection
    logger = _log
    accept_after = 0.0  # monotonic; 0: there is no pause

    def __init__(self, sock: socket.socket, service: Service, inherited: bool) -> None:
        self.service = service
        self.inherited = inherited
        self.file = None if inherited or sock.family != socket.AF_UNIX else os.lstat(sock.getsockname())
        super().__init__(
            service.application,
            map=service.map,
            _sock=sock,
            dispatcher=service.dispatcher,
            adj=service.adjustments,
            sockinfo=(sock.family, sock.type, sock.proto, sock.getsockname()),
            bind_socket=False,
        )

    def accept_connections(self) -> None:
        """Begins to accept. An inherited socket listens already, with the backlog that its owner gave it."""
        if self.inherited:
            self.accepting = True
        else:
            super().accept_connections()

    def accept(self) -> Any:
        """The next connection, or None. Without a free descriptor it pauses: a retry would fail at once, for ever."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.accept_after = time.monotonic() + 1.0
            _say(f"cannot accept a connection for now: {error.strerror}")
            return None

    def readable(self) -> bool:
        """Whether to wait for connections."""
        if self.service.draining or (self.accept_after and time.monotonic() < self.accept_after):
            return False
        self.accept_after = 0.0
        if self.service.leaves_waiting():
            return False
        return bool(super().readable())

    def retire(self) -> None:
        """Accepts no more. An own socket takes the connections that are made, then it closes and removes its file."""
        if not self.inherited:
            waiting = select.poll()
            waiting.register(self.socket, select.POLLIN)
            while waiting.poll(0) and time.monotonic() >= self.accept_after:
                self.handle_accept()
            self.del_channel()
            if self.file is not None:
                _remove_if_same(self.socket.getsockname(), self.file)
            self.socket.close()
        self.accepting = False


class _Tcp(_Listening, TcpWSGIServer):  # type: ignore[misc]
    pass


class _Unix(_Listening, UnixWSGIServer):  # type: ignore[misc]
    def fix_addr(self, addr: object) -> tuple[str, str]:
        """The client's address: REMOTE_ADDR and REMOTE_PORT. It has none, and "localhost" is none."""
        return "", ""


class _Stats(wasyncore.dispatcher):  # type: ignore[misc]
    """Tells whoever connects to the Unix socket at `path` how much there is to do: one JSON document, then the end.

    That is short enough for the buffer of a new connection, so nobody is waited for. Raises OSError, Refused.
    """

    accept_after = 0.0  # monotonic

    def __init__(self, path: str, service: Service) -> None:
        self.service = service
        self.path = path
        sock = _bound(socket.AF_UNIX, path, mode=0o600)
        sock.listen(16)
        self.file = os.lstat(path)
        super().__init__(sock, map=service.map)
        self.accepting = True

    def readable(self) -> bool:
        """Whether to wait for clients. Without a free descriptor not for a while: see `_Listening.accept`."""
        return time.monotonic() >= self.accept_after

    def writable(self) -> bool:
        """Never: a client gets its answer at once."""
        return False

    def handle_accept(self) -> None:
        """Answers one client. What goes wrong is the client's loss."""
        try:
            accepted = self.accept()
            if accepted is not None:
                with accepted[0] as client:
                    client.setblocking(False)
                    client.send(json.dumps(self.service.figures()).encode())
        except OSError as error:
            if error.errno in NO_ROOM:
                self.accept_after = time.monotonic() + 1.0

    def retire(self) -> None:
        """Tells no more, and removes its file."""
        self.del_channel()
        self.socket.close()
        _remove_if_same(self.path, self.file)


# --- The service ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line. Times are in seconds."""

    app: str
    bind: tuple[str, ...]
    middleware: tuple[str, ...]
    access_log: bool
    drain_timeout: float
    idle_grace: float
    stats: str
    adjustments: Any  # waitress.adjustments.Adjustments
    leave_waiting: bool = False


class _Count:
    """How many requests were answered, and how long one takes: the mean of about the last RECENT."""

    RECENT = 64

    def __init__(self) -> None:
        self.answered = 0
        self.seconds = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """One more, in any thread."""
        with self._lock:
            self.answered += 1
            self.seconds += (seconds - self.seconds) / min(self.answered, self.RECENT)


class Service:
    """An application on its sockets, until it is told to stop. `run()` is all that it is for.

    waitress' loop runs in the calling thread, which must be the main one, for the signals. Nothing here waits without a
    reason: the loop sleeps until a socket, a signal, a thread or the nearest deadline wakes it.
    """

    def __init__(
        self,
        application: Application,
        options: Options,
        *,
        inherited: Sequence[socket.socket],
        own: Sequence[socket.socket],
    ) -> None:
        self.application = application
        self.options = options
        self.access_log = options.access_log
        self.adjustments = options.adjustments
        self.map: dict[int, Any] = {}
        self.busy: set[_Connection] = set()  # a thread works for these; they may be closed
        self.count = _Count()
        self.draining = False  # a signal came: the threads see it at once, the loop in its next turn
        self.dispatcher = ThreadedTaskDispatcher()
        self.dispatcher.logger, self.dispatcher.queue_logger = _log, _QueueLog()
        self.dispatcher.set_thread_count(self.adjustments.threads)
        kinds = {socket.AF_UNIX: _Unix}
        self.listening = [kinds.get(sock.family, _Tcp)(sock, self, True) for sock in inherited]
        self.listening += [kinds.get(sock.family, _Tcp)(sock, self, False) for sock in own]
        self.stats = self._open_stats()

    def run(self, notify_socket: str) -> int:
        """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process. Returns the exit status."""
        self._catch_signals()
        _say(f"serving {self.options.app} on {', '.join(map(self._name, self.listening))}")
        _notify(notify_socket, "READY=1")
        while not self.draining:
            self._turn(self._patience())
        _notify(notify_socket, "STOPPING=1")
        deadline = time.monotonic() + self.options.drain_timeout
        for each in self.listening:
            each.retire()
        while (connections := self._connections()) or self.busy:
            now = time.monotonic()
            wake = min([deadline, *(self._part(each, now) for each in connections)])
            if now >= deadline:
                return self._cut()
            self._turn(max(0.0, wake - now) + 0.001)
        self.dispatcher.shutdown()
        if self.stats is not None:
            self.stats.retire()
        return 0

    def leaves_waiting(self) -> bool:
        """All threads are busy, and others may accept: what connects now waits where they, and procman, can see it."""
        at_work = len(self.busy) + len(self.dispatcher.queue)
        return self.options.leave_waiting and at_work >= self.adjustments.threads

    def figures(self) -> dict[str, Any]:
        """What `--stats` tells."""
        return {
            "pid": os.getpid(),
            "threads": self.adjustments.threads,
            "requests": self.count.answered,
            "average_seconds": round(self.count.seconds, 6) if self.count.answered else None,
            "in_flight": len(self.busy),
            "queue": len(self.dispatcher.queue),
            "connections": len(self._connections()),
        }

    def _open_stats(self) -> _Stats | None:
        """A server serves without it."""
        try:
            return _Stats(self.options.stats, self) if self.options.stats else None
        except OSError as error:
            _say(f"--stats {self.options.stats}: {error.strerror or error}: tells nothing there")
            return None

    def _turn(self, timeout: float | None) -> None:
        wasyncore.loop(timeout, use_poll=True, map=self.map, count=1)

    def _patience(self) -> float | None:
        """How long the loop may sleep when nothing happens: for ever, but for waitress' care of idle connections."""
        # A listening socket has a trigger beside it, signals have one, and there is `stats`; the rest are connections.
        others = 2 * len(self.listening) + 1 + (self.stats is not None)
        patience = float(self.adjustments.cleanup_interval) if len(self.map) > others else None
        for each in self.listening:
            if each.accept_after:
                pause = max(0.0, each.accept_after - time.monotonic()) + 0.001  # waitress cuts it to whole milliseconds
                patience = pause if patience is None else min(patience, pause)
        return patience

    def _connections(self) -> list[_Connection]:
        return [each for each in self.map.values() if isinstance(each, _Connection)]

    def _part(self, connection: _Connection, now: float) -> float:
        """Closes a connection that has been silent for long enough. Returns when to look again (monotonic)."""
        since = connection.parted_at
        if since is None:
            closing = connection.close_when_flushed or connection.will_close
            if closing or connection in self.busy or connection.pending():
                connection.silent_since = None
                return float("inf")  # what comes next wakes the loop
            since = connection.silent_since = now if connection.silent_since is None else connection.silent_since
        end = since + self.options.idle_grace
        if now >= end:
            connection.handle_close()
        return end

    def _cut(self) -> int:
        """The drain took too long."""
        connections = self._connections()
        count = sum(each.pending() for each in connections) + len(self.busy.difference(connections))
        if count:
            requests = "1 request" if count == 1 else f"{count} requests"
            _say(f"the drain timeout of {self.options.drain_timeout:g} s is over: {requests} cut off")
        return CUT if count else 0

    @staticmethod
    def _name(listening: Any) -> str:
        host, port = listening.effective_host, listening.effective_port
        return f"unix:{port}" if host == "unix" else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _catch_signals(self) -> None:
        pid = os.getpid()

        def stop(number: int, frame: FrameType | None) -> None:
            if os.getpid() != pid:  # a fork of the application, by multiprocessing say: it has nothing to drain
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            elif self.draining:
                _say(f"a second {signal.Signals(number).name}: exits at once")
                os._exit(CUT)
            else:
                self.draining = True

        # Python calls `stop` between two of its own instructions. A signal that comes after the last one before poll(2)
        # would wait there for the next connection: so its byte, which is written at once, ends the poll.
        wake = trigger(self.map)
        os.set_blocking(wake.trigger, False)
        signal.set_wakeup_fd(wake.trigger, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)


# --- The command line ----------------------------------------------------------------------------------------------


def adjustments(threads: int, settings: Sequence[str]) -> Any:
    """waitress' Adjustments from NAME=VALUE texts. Raises Refused for a name or value that waitress can't take."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # waitress' own default, 100, is made for select(2); beyond it connections wait, though they cost but a descriptor.
    values: dict[str, Any] = {"connection_limit": max(100, min(1000, room // 2))}
    casts = Adjustments._param_map
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        where = f"--set {setting}"
        if not equals:
            raise Refused(f"{where}: expected NAME=VALUE", WRONG_USE)
        if name in ELSEWHERE:
            raise Refused(f"{where}: use {ELSEWHERE[name]}", WRONG_USE)
        if name not in casts or name.startswith("asyncore_"):
            close = difflib.get_close_matches(name, casts.keys() - ELSEWHERE.keys(), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise Refused(f"{where}: waitress has no option {name!r}{hint}", WRONG_USE)
        kind = casts[name].__name__
        if kind == "asbool" and value.lower() not in {"true", "yes", "on", "1", "false", "no", "off", "0"}:
            raise Refused(f"{where}: expected true or false", WRONG_USE)
        if kind == "int" and not re.fullmatch(r"[0-9]{1,18}", value):
            raise Refused(f"{where}: expected a whole number", WRONG_USE)
        values[name] = value
    try:
        return Adjustments(threads=threads, **values)
    except ValueError as error:
        raise Refused(f"--set: {error}", WRONG_USE) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="procman.wsgi", description="Serves a WSGI application.", allow_abbrev=False)
    for name, kind, default, metavar, text in (
        ("app", str, None, "APP", '"MODULE:NAME", or "MODULE:FACTORY()"'),
        ("--bind", list, [], "ADDR", "HOST:PORT, [IPV6]:PORT, :PORT or unix:/path"),
        ("--threads", int, 4, "N", "requests that are answered at the same time"),
        ("--middleware", list, [], "MODULE:NAME", "factory(app) -> app; the first one is the outermost"),
        ("--drain-timeout", float, 30.0, "SECONDS", "when stopping: to answer what has arrived"),
        ("--idle-grace", float, 1.0, "SECONDS", "when stopping: for silent connections"),
        ("--stats", str, None, "PATH", "a Unix socket that tells requests, and what is at work, as JSON"),
        ("--site", str, None, "DIR", "a folder to append to sys.path, where waitress is found"),
        ("--set", list, [], "NAME=VALUE", "an option of waitress, by its own name"),
    ):
        if kind is list:
            parser.add_argument(name, action="append", default=default, metavar=metavar, help=f"{text} (repeatable)")
        else:
            shown = "" if default is None else f" ({default:g})"
            parser.add_argument(name, type=kind, default=default, metavar=metavar, help=text + shown)
    words = "accept nobody while all threads are busy: for several processes on one socket"
    parser.add_argument("--leave-waiting", action="store_true", help=words)
    parser.add_argument("--no-access-log", action="store_true", help="no line on stdout for each request")
    return parser


def options(argv: Sequence[str]) -> Options:
    """The command line, checked. Raises Refused, or SystemExit (status 2) from argparse."""
    given = _parser().parse_args(argv)
    for spec, form in [(given.app, r"[\w.]+:[\w.]+(\(\))?"), *((each, r"[\w.]+:[\w.]+") for each in given.middleware)]:
        if not re.fullmatch(form, spec):
            raise Refused(f"{spec!r} is not of the form MODULE:NAME", WRONG_USE)
    if given.threads < 1:
        raise Refused(f"--threads {given.threads}: at least 1", WRONG_USE)
    for name, value in (("--drain-timeout", given.drain_timeout), ("--idle-grace", given.idle_grace)):
        if not 0 <= value < 1e6:  # false for nan too
            raise Refused(f"{name} {value}: expected seconds, 0 or more", WRONG_USE)
    return Options(
        app=given.app,
        bind=tuple(given.bind),
        middleware=tuple(given.middleware),
        access_log=not given.no_access_log,
        drain_timeout=given.drain_timeout,
        idle_grace=given.idle_grace,
        stats=given.stats or "",
        leave_waiting=given.leave_waiting,
        adjustments=adjustments(given.threads, given.set),
    )


def main(argv: Sequence[str]) -> int:
    """Serves as the command line says. Returns the exit status: 0 drained, 1 requests cut off, or no socket, 2 wrong
    use, 3 the application can't be loaded."""
    for fd in (0, OUT, ERR):  # started with one closed: else the next socket would become it, and get the access log
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
    try:
        asked = options(argv)
        inherited = inherited_sockets(os.environ)
        binds = asked.bind or (() if inherited else ("127.0.0.1:8000",))
        mode = asked.adjustments.unix_socket_perms
        own = [sock for bind in binds for sock in bound_sockets(bind, mode)]
        application = load_all(asked.app, asked.middleware)
        status = Service(application, asked, inherited=inherited, own=own).run(notify_socket)
    except Refused as error:
        _say(str(error))
        return error.status
    if status:
        os._exit(status)  # threads still run the application: the interpreter's orderly end could wait for them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an atexit function that hangs can be ended
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
