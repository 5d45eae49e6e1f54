"""Where the daemon's own messages go: a descriptor, and no buffer, so that nothing is half said by a process that dies.

What a full or broken disk does not take is counted, and told with the first message that it takes again. A message must
never be a reason for another one.
"""

from __future__ import annotations

import errno
import logging
import os

FORMAT = "%(asctime)s %(levelname)s %(message)s"


class OwnLog(logging.Handler):
    """Writes to `fd`, which may be replaced at any time, and stays the caller's."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self.fd = fd
        self._lost = 0
        self._torn = False
        self._reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - a wrong format string; logging says where
            self.handleError(record)
            return
        if self._lost:
            text = f"{self._lost} messages were lost here: {self._reason}\n{text}"
        data = ("\n" * self._torn + text + "\n").encode(errors="backslashreplace")
        try:
            written = os.write(self.fd, data)
        except OSError as error:
            self._lost += 1
            self._reason = error.strerror or str(error)
            return
        self._torn = written < len(data)
        self._lost = int(self._torn)
        self._reason = os.strerror(errno.ENOSPC) if self._torn else ""
