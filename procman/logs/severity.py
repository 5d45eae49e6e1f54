"""How bad a line of output is, as syslog and the journal want to know: a number, by RFC 5424 (6.2.1).

Taken from the line, where it tells: a prefix "<3>" as in sd-daemon(3), which is not part of the message, or the word
for a level near its beginning, as logging, gunicorn, uWSGI, Django, uvicorn and many others print it. Else by stream;
but all lines of a traceback are errors.
"""

from __future__ import annotations

import re

ERROR, WARNING, INFO, DEBUG = 3, 4, 6, 7

LEVELS = {
    b"EMERGENCY": 0, b"EMERG": 0, b"PANIC": 0, b"ALERT": 1, b"CRITICAL": 2, b"CRIT": 2, b"FATAL": 2,
    b"ERROR": ERROR, b"ERR": ERROR, b"WARNING": WARNING, b"WARN": WARNING, b"NOTICE": 5, b"INFO": INFO,
    b"DEBUG": DEBUG, b"TRACE": DEBUG,
}  # fmt: skip

BEGINNING = 120
"""Bytes of a line in which its level stands."""

_WORDS = b"|".join(sorted(LEVELS, reverse=True))
_LEVEL = re.compile(
    rb"(?:^|[\s\[|(])(" + _WORDS + rb")(?=[\]\s:|)]|$)"  # "ERROR:root:", "... - ERROR - ", "[INFO]"
    rb"|\[(" + _WORDS.lower() + rb")\]"  # nginx: "[error]"
    rb'|"(?:level|levelname|severity)": ?"(?i:(' + _WORDS + rb'))"'  # JSON
)


_HEAD = re.compile(rb"[\s|+-]*(?:Exception Group )?Traceback \(most recent call last\):")
_FRAME = re.compile(rb"[\s|+]+\S")
_CHAIN = (
    b"The above exception was the direct cause of the following exception:",
    b"During handling of the above exception, another exception occurred:",
)


class Severities:
    """Those of the lines of one stream, which come one after the other. `error`: it is stderr, and that apart; such a
    line is an error unless it says otherwise."""

    def __init__(self, *, error: bool) -> None:
        self._usual = ERROR if error else INFO
        self._inside = False  # of a traceback
        self._names = False  # its exception, in its next line that is not indented; a group has none there

    def of(self, line: bytes) -> tuple[int, bytes]:
        """(the severity of a line, the line without a prefix that told it)."""
        if line[:1] == b"<" and line[2:3] == b">" and line[1:2] in b"01234567":
            return line[1] - ord("0"), line[3:]
        if _HEAD.match(line):
            self._inside, self._names = True, not line[:1].isspace()
            return ERROR, line
        if self._inside and _FRAME.match(line):
            return ERROR, line
        named, self._inside = self._inside and self._names, False
        found = _LEVEL.search(line, 0, BEGINNING)
        if found:
            return LEVELS[(found[1] or found[2] or found[3]).upper()], line
        return (ERROR if named or line in _CHAIN else self._usual), line
