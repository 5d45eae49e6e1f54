"""The times that people write for `--since` and `--until`: "10 min ago", "2h", "yesterday", "09:30", "2030-01-31".

Pure: `now` comes in.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo

EXAMPLES = '"10 min ago", "2h", "yesterday", "09:30", "2030-01-31 12:00", "2030-01-31T12:00:00Z", "@1895572800"'

_UNITS = {
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 0.001),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
    **dict.fromkeys(("w", "week", "weeks"), 604800.0),
}
_SPAN = re.compile(r"(?:\d{1,9}(?:\.\d{1,6})? ?[a-z]+[ ,]*)+")
_PART = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]+)")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?")


def moment(text: str, now: float, zone: tzinfo | None = None) -> float:
    """Seconds since the epoch. A time without a zone is local: in `zone`, None being this machine's. Raises ValueError
    with a text for people.

    A span means so long ago, with or without "ago". A time of the day is the last one that has been. A date alone is
    its midnight.
    """
    words = " ".join(text.lower().split())
    local = datetime.fromtimestamp(now, zone)
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    try:
        if words in ("now", "today", "yesterday"):
            day = midnight - timedelta(days=words == "yesterday")
            return now if words == "now" else day.timestamp()
        if words.startswith("@"):
            return _checked(float(words[1:]))
        ago = words.removesuffix("ago").strip().removeprefix("-")
        if _SPAN.fullmatch(ago):
            return _checked(now - sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(ago)))
        if found := _CLOCK.fullmatch(words):
            hour, minute, second = (int(part or 0) for part in found.groups()[:3])
            part = int((found[4] or "").ljust(6, "0"))
            at = midnight.replace(hour=hour, minute=minute, second=second, microsecond=part)
            both = (at.replace(fold=fold).timestamp() for fold in (1, 0))  # it may come twice today (PEP 495)
            return next((has for has in both if has <= now), (at.replace(fold=0) - timedelta(days=1)).timestamp())
        at = datetime.fromisoformat(text.strip().replace("/", "-"))
        return _checked((at if at.tzinfo else at.replace(tzinfo=zone)).timestamp())
    except (ValueError, KeyError, OverflowError, OSError):
        raise ValueError(f"{text[:60]!r} is no time: it must be like {EXAMPLES}") from None


def _checked(at: float) -> float:
    if not -1e11 < at < 2.6e11:  # and no NaN
        raise ValueError(at)
    return at


def rfc3339(at: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
