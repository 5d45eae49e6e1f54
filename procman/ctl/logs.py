"""`procmanctl logs`: what programs have printed: the end of it, what a filter chooses, what comes, or what it amounts
to.

All the work is done here, not in the daemon, which only gives bytes of files: a pattern that takes for ever keeps
nobody but who asked for it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from procman.errors import Failed, WrongUse
from procman.rpc import NO_SUCH_METHOD, RpcError

from . import tables
from .library import PIECE, Library, Local, Remote, Source, reachable
from .loglines import LinePrinter
from .session import NAMES, Help, Session, colours

if TYPE_CHECKING:
    from datetime import tzinfo

    from procman.logrecords import Filter, Record, Records, Whole

    from .logtext import LogText, Place

LINES = 10
"""Shown where nothing else says how many."""

Key = tuple[str, str]


def add_logs(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The sub-parser of this command."""
    words = "print the output of programs, merged by time"
    parser = commands.add_parser("logs", help=words, description=words, parents=[shared], formatter_class=Help)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{NAMES} (default: all)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    chosen = "with --grep, --level, --since or --until the last N records that these choose"
    words = f"the last N lines of each log; {chosen} (default: {LINES})"
    parser.add_argument("-n", "--lines", type=_lines, metavar="N", help=words)
    words = 'from this time on, and all of it: "10 min ago", "2h", "09:30", "yesterday", "2030-01-31 12:00"'
    parser.add_argument("--since", metavar="TIME", help=words)
    parser.add_argument("--until", metavar="TIME", help="up to this time")
    words = "only what this regular expression of Python finds something in, with the traceback below it"
    parser.add_argument("-g", "--grep", metavar="REGEX", help=words)
    parser.add_argument("-i", "--ignore-case", action="store_true", help="--grep takes a for A")
    words = "only what has at least this level: debug, info, warning, error, critical"
    parser.add_argument("--level", metavar="LEVEL", help=words)
    words = "not the lines, but what they amount to: rates, levels, HTTP answers, slow paths, errors"
    parser.add_argument("--summary", action="store_true", help=words)
    parser.add_argument("--raw", action="store_true", help="control characters as they are, on a terminal too")
    words = 'only standard error, where the table keeps it "separate"'
    parser.add_argument("--stderr", action="store_true", help=words)
    parser.set_defaults(run=logs)


def _lines(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines from 0")
    return int(text)


def logs(session: Session) -> int:
    """Prints what was asked for."""
    args = session.args
    if args.follow and (args.summary or args.until is not None):
        raise WrongUse(f"-f never ends, so there is no {'--summary' if args.summary else '--until'} with it")
    now = time.time()
    wanted = None
    if args.summary or any(one is not None for one in (args.since, args.until, args.level, args.grep)):
        wanted = _filter(args, now)
    with session.client() as client:
        # With -c, and no daemon there, the files of that table.
        local = session.config is not None and not reachable(client)
        library: Library = Local(str(session.config)) if local else Remote(session.client, client)
        reader = Reader(session, library, _sources(session, library), wanted, now)
        if args.summary:
            from .summing import summarise

            status = summarise(session, reader)
            reader.hint()
            return status
        reader.show()
    return 0


def _sources(session: Session, library: Library) -> list[Source]:
    """The logs that are meant; whose output goes elsewhere is told where to."""
    try:
        sources = library.sources(session.args.names, stderr=session.args.stderr)
    except RpcError as error:
        if error.number != NO_SUCH_METHOD:
            raise
        raise Failed(
            "the daemon is older than this procmanctl, and can't tell of its logs so",
            hint="procmanctl daemon upgrade",
        ) from None
    if session.args.names or not sources:
        for name, text in library.elsewhere.items():
            print(f"procmanctl: {tables.printable(name)}: {tables.printable(text)}", file=sys.stderr)
        if not sources and not library.elsewhere:
            print("procmanctl: no log file holds this output (see log in the program table)", file=sys.stderr)
    return sources


def _filter(args: argparse.Namespace, now: float) -> Filter:
    from procman import logformat, moments
    from procman.logrecords import Filter

    times: list[float | None] = []
    for option in ("since", "until"):
        text = getattr(args, option)
        try:
            times.append(None if text is None else moments.moment(text, now))
        except ValueError as error:
            raise WrongUse(f"--{option}: {error}") from None
    if times[0] is not None and times[1] is not None and times[0] > times[1]:
        raise WrongUse(f"--since {args.since[:40]} is later than --until {args.until[:40]}: nothing lies between them")
    level = logformat.level_number(args.level) if args.level is not None else 0
    if args.level is not None and not level:
        raise WrongUse(f"--level: {args.level[:40]!r} is none: it must be {', '.join(logformat.LEVELS)}")
    grep = None
    if args.grep is not None:
        try:
            grep = re.compile(args.grep.encode("utf-8", "surrogateescape"), re.IGNORECASE if args.ignore_case else 0)
        except (re.error, OverflowError, RecursionError) as error:
            raise WrongUse(f"--grep: {args.grep[:80]!r} is no regular expression: {error}") from None
    return Filter(times[0], times[1], level, grep)


class Reader:
    """What one `procmanctl logs` reads, and how."""

    def __init__(
        self, session: Session, library: Library, sources: Sequence[Source], wanted: Filter | None, now: float
    ) -> None:
        from .logtext import LogText

        self.wanted = wanted
        self._args = session.args
        self._library = library
        self._piece = PIECE if len(sources) < 5 else PIECE // 16
        self.texts: list[LogText] = [LogText(library, source, now) for source in sources]
        self._makers: dict[Key, Records] = {}
        self._wholes: dict[Key, Whole] = {}
        self._zones: dict[str, tzinfo | None] = {}  # by program
        self._timed: dict[Key, bool] = {}  # by log that said something: whether a line of it told a time
        terminal = sys.stdout.isatty()
        self._printer = LinePrinter(
            sys.stdout.buffer,
            [source.key for source in sources],
            colour=colours(sys.stdout),
            as_json=session.json,
            safe=terminal and not self._args.raw,
        )

    def show(self) -> None:
        """Prints it, and with `-f` what comes."""
        plain = self._printer.as_is and self.wanted is None
        try:
            if plain:
                for text in self.texts:
                    for data in text.forward(text.last_lines(self._count() or 0), piece=PIECE):
                        self._printer.copy(text.source.key, data)
            else:
                merged = heapq.merge(*(self._placed(text) for text in self.texts), key=lambda item: item[0])
                for _, key, record in merged:
                    self._print(key, record)
            self._printer.flush()
            self.tell_losses()
            self.hint()
            if self._args.follow:
                self._follow()
        finally:
            self._printer.end()

    def tell_losses(self) -> None:
        """Says what was removed before it could be read."""
        for text in self.texts:
            text.tell_losses()

    def hint(self) -> None:
        """Says which logs tell no time, or those of another zone, where one was asked for."""
        if self.wanted is None or (self.wanted.since, self.wanted.until) == (None, None):
            return
        for text in self.texts:
            if text.zone is not None:
                words = "times there that name no zone are not local time: they are taken for"
                print(f"procmanctl: {tables.printable(text.source.name)}: {words} {text.zone}", file=sys.stderr)
        names = dict.fromkeys(name for (name, _), timed in self._timed.items() if not timed)
        if names:
            what = "lines there tell no time, so --since and --until can't choose among them"
            key = "log = { timestamps = true } in the program table puts one before each line"
            print(f"procmanctl: {', '.join(map(tables.printable, names))}: {what}; {key}", file=sys.stderr)

    def _count(self) -> int | None:
        """How many lines, or records; None for all."""
        args = self._args
        if args.lines is not None:
            return int(args.lines)
        return None if args.since is not None or args.until is not None or args.summary else LINES

    def _print(self, key: Key, record: Record) -> None:
        for line, said in zip(record.lines, record.said, strict=True):
            self._printer.line(key, line, said.time if said.time is not None else record.at, record.level)

    # --- one log ----------------------------------------------------------------------------------------------------

    def records(self, text: LogText) -> Iterator[Record]:
        """Those of one log that are wanted. What makes its records, and chooses among them, stays for what follows."""
        from procman import logrecords

        wanted = self.wanted or logrecords.Filter()
        whole = self._wholes[text.source.key] = logrecords.Whole(wanted)
        start, skip, exact = self._start(text, wanted)
        maker = self._makers[text.source.key] = text.maker(start, exact=exact)
        self._zones[_program(text.source.key)] = text.zone
        sieve = logrecords.sieve(wanted.grep)
        for record in text.records(maker, start, piece=self._piece, sieve=sieve, goes_on=self._args.follow):
            if not self._timed.get(text.source.key):
                self._timed[text.source.key] = record.at is not None
            if wanted.after(record):
                return
            for each in whole.let(record):
                skip -= not each.part
                if skip < 0:
                    yield each

    def _start(self, text: LogText, wanted: Filter) -> tuple[Place, int, bool]:
        """Where to begin, how many records to leave out there, and whether a record surely begins there."""
        from .logtext import HELD, Place

        count = self._count()
        if count is not None and not wanted.chooses and wanted.since is None and wanted.until is None:
            return text.last_lines(count), 0, True
        first = Place() if wanted.since is None else text.since(wanted.since)
        if count is None:
            return first, 0, False
        start, skip = text.last_records(count, wanted, first) if count else (text.end(), 0)
        if self._args.follow and wanted.chooses and start == text.end():
            # What is looked for may come in a record whose first lines are there: none that is whole is shown.
            return max(text.plus(start, -HELD), first), sys.maxsize, False
        return start, skip, start != first

    def _placed(self, text: LogText) -> Iterator[tuple[float, Key, Record]]:
        """The records of a log with the time by which they are merged; a log without any time is placed where its file
        was last written."""
        for record in self.records(text):
            yield (text.modified(text.reached.file) if record.at is None else record.at), text.source.key, record

    # --- what comes -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        places = {text.source.key: text.position() for text in self.texts}
        if not places:
            return
        self._printer.flush()

        def heard(key: Key, data: bytes) -> None:
            self._printer.add(key)
            if self.wanted is None and self._printer.as_is:
                self._printer.copy(key, data)
            else:
                if key not in self._makers:
                    self._begin(key)
                maker = self._makers[key]
                maker.read_at(time.time())
                for record in itertools.chain(maker.feed(data), maker.flush()):
                    for shown in self._wholes[key].let(record):
                        self._print(key, shown)
            self._printer.flush()

        self._library.follow(places, heard)

    def _begin(self, key: Key) -> None:
        """The next bytes of this log are the first that are taken apart. It comes now: no time in it is too early."""
        from procman.logformat import Clock
        from procman.logrecords import Filter, Records, Whole

        self._makers[key] = Records(Clock(time.time(), self._zones.get(_program(key))))
        self._wholes[key] = Whole((self.wanted or Filter())._replace(since=None))


def _program(key: Key) -> str:
    return key[0].partition(":")[0]
