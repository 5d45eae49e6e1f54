"""Who is measured: procman and all of its peers that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.bench.circusd import Circusd
from tests.bench.contenders import Contender
from tests.bench.figures import OURS
from tests.bench.machine import TooSlow
from tests.bench.pm2 import Pm2
from tests.bench.procmand import Procmand
from tests.bench.suites import Runsvdir, Svscan
from tests.bench.supervisord import Supervisord

ALL: Sequence[type[Contender]] = (Procmand, Supervisord, Circusd, Pm2, Svscan, Runsvdir)
ORDER = tuple(kind.title for kind in ALL)


def present(peers: Collection[str] = ()) -> list[type[Contender]]:
    """Those that can be measured here, procman first; with `peers`, of the others only these."""
    wanted = {*peers, OURS} if peers else set(ORDER)
    return [kind for kind in ALL if kind.title in wanted and not kind.missing()]


def left_out() -> Mapping[str, str]:
    """Why the others can't, by title."""
    return {kind.title: kind.missing() for kind in ALL if kind.missing()}


class Notes:
    """What went wrong with a contender: it is left out of that part, and the figures say so; the run goes on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        """Once, however often it happens."""
        self._say(text)
        if text not in self.texts:
            self.texts.append(text)

    @contextmanager
    def leaving_out(self, title: str) -> Iterator[None]:
        """A failure in the block is that of the contender `title`, but not one that came of ending the run."""
        try:
            yield
        except (TooSlow, AssertionError, RuntimeError, OSError, ValueError) as error:
            cause: BaseException | None = error
            while cause is not None:
                if not isinstance(cause, Exception):
                    raise cause from error
                cause = cause.__context__
            self.add(f"{title} is left out: {error}")
