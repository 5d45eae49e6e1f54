"""A line of an access log: who asked for what, what was answered, and how long that took.

Known: the common and the combined format (gunicorn, the built-in server, nginx, Apache, hypercorn, daphne), with a
duration at the end where there is one; uvicorn, granian, Flask's and Django's development servers, and uWSGI. Pure.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD = 64 * 1024
"""Bytes of a line that are looked at."""

NO_REQUEST = "-", "(no request)"
"""The method and the path of what is no request: nothing, or the bytes of TLS."""

# The first quoted field is the request. A quote that a client has sent comes with a backslash before it.
_BEFORE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*(?=")', re.DOTALL)
_REQUEST = re.compile(
    rb'"(?P<method>[A-Z][A-Z-]{2,19}) (?P<path>[^ "\\]*(?:\\.[^ "\\]*)*)'
    rb'(?: (?:HTTP/)?(?P<version>[0-9.]{1,3}))?" (?P<status>[1-5]\d\d)(?= |\Z)(?P<rest>.*)',
    re.DOTALL,
)
_ANY_REQUEST = re.compile(  # which may hold anything, and is one by what stands before it
    rb'(?:[^"\n]{0,400}?\[\d\d/[A-Z][a-z]{2}/\d{4}[: ]\d\d:\d\d:\d\d(?: [+-]\d{4})?\]'
    rb'|INFO: {1,8}[^ "]{1,100} -|\[[0-9-]{10} [0-9:]{8} [+-]\d{4}\] [^ "]{0,100} -)'
    rb' "(?P<request>[^\n]*?)" (?P<status>[1-5]\d\d)(?= |\Z)(?P<rest>.*)',
    re.DOTALL,
)
_ASKED = re.compile(rb"(?P<method>[A-Za-z-]{3,20}) (?P<path>.*?)(?: (?:HTTP/)?[0-9.]{1,3})?", re.DOTALL)
_HTTPS = b"] You're accessing the development server over HTTPS"
"""Django's runserver says this, after its time, in place of the line with the answer 400."""
_UWSGI = re.compile(
    rb"\[pid: \d+\|[^\]\n]{0,80}\] [^\[\n]{0,300}\[[^\]\n]{0,40}\] (?P<method>[^ \n]*) (?P<path>[^ \n]*)"
    rb" => generated (?P<size>\d+) bytes in (?P<took>\d+) (?P<unit>msecs|micros)(?: via [a-z]+\(\))?"
    rb" \((?:HTTP/[0-9.]+ |[^\n]{0,1000}? )(?P<status>[1-5]\d\d)\) \d+ headers "
)
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_GRANIAN = re.compile(rb'\[[^\]"]*\] [^ "]* - "')
_TOOK = re.compile(rb"(?:[a-z_]+=)?\"?(\d{1,12}(?:\.\d{1,9})?) ?(ms|msecs?|s|sec|us)?\"?\s*\Z")
_ID = re.compile(r"\d+|[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,}", re.IGNORECASE)

PATH_MAX = 200
"""Characters of a path that is shown."""


class Answer(NamedTuple):
    """`seconds` is None where the log does not tell how long it took."""

    method: str
    path: str
    status: int
    seconds: float | None


def parse(line: bytes) -> Answer | None:
    """What a line of an access log tells; None for another line."""
    head = line[:HEAD]
    if head.startswith(b"[pid: "):
        found = _UWSGI.match(head)
        if found is None:
            return None
        took = int(found["took"]) / (1e3 if found["unit"] == b"msecs" else 1e6)
        asked = (_text(found["method"]), _text(found["path"])) if found["method"] else NO_REQUEST
        return Answer(*asked, int(found["status"]), took)
    at = head.find(b'"')
    if at < 0:
        return Answer(*NO_REQUEST, 400, None) if head.startswith(_HTTPS, 21) else None
    if b"\x1b" in head:  # of Flask
        head = _COLOURS.sub(b"", head)
        at = head.find(b'"')
    if head.find(b"\\", 0, at) >= 0:
        before = _BEFORE.match(head)
        at = len(head) if before is None else before.end()
    if found := _REQUEST.match(head, at):
        asked = _text(found["method"]), _text(found["path"])
    elif (b'] "' in head or b' - "' in head) and (found := _ANY_REQUEST.match(head)):
        asked = _asked(found["request"])
    else:
        return None
    return Answer(*asked, int(found["status"]), _seconds(found["rest"], granian=bool(_GRANIAN.match(head))))


def _asked(request: bytes) -> tuple[str, str]:
    """The method and the path of a request, as far as it is one."""
    found = _ASKED.fullmatch(request)
    return NO_REQUEST if found is None else (_text(found["method"]), _text(found["path"]))


def _seconds(rest: bytes, *, granian: bool) -> float | None:
    """The duration at the end of the line: with a unit; with a name (`rt=0.012`) or a point, seconds; else, after the
    quoted fields of the combined format, microseconds (%D of Apache and gunicorn). Granian tells milliseconds."""
    if granian:
        return float(rest) / 1e3 if re.fullmatch(rb" \d{1,12}(?:\.\d{1,9})?", rest) else None
    last = rest.rpartition(b" ")[2]
    found = _TOOK.match(last)
    if found is None:
        return None
    number, unit = float(found[1]), found[2]
    if unit:
        return number / {b"s": 1.0, b"se": 1.0, b"ms": 1e3, b"us": 1e6}[unit[:2]]
    if b"=" in last or b"." in last:
        return number
    return number / 1e6 if rest.count(b'"') >= 4 and not rest.rstrip().endswith(b'"') else None


def place(path: str) -> str:
    """What a path is counted as: without the query, with "*" for what is a number or another identifier."""
    bare = path.partition("?")[0][:PATH_MAX]
    if not any(character.isdigit() for character in bare):
        return bare
    return "/".join("*" if _ID.fullmatch(part) else part for part in bare.split("/"))


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
