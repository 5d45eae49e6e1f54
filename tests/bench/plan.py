"""How much a run measures: numbers of programs, rounds and seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Fleet:
    """A number of programs that do nothing, and what is done with a manager of them."""

    programs: int
    rounds: int = 1
    """How often each manager is started, in turn."""

    idle_seconds: float = 5.0
    """Length of one idle window: procman's default sampling falls once into 5 seconds. 0: none."""

    status_calls: int = 5
    """In each round."""

    kills: int = 3
    """Of one program at a time, in each round."""

    start_seconds: float = 90.0
    """A manager whose programs do not all run by then is left out."""

    stop_command: bool = True
    """Whether all are stopped by a command and started again too, before the manager ends."""

    print_mb: float = 100.0
    """What one program prints beside those that do nothing, in each round."""

    end_seconds: float = 60.0
    """A manager that has not ended by then is not waited for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Each field is what one run does; the defaults are the full run, some 30 minutes on 2 cores that nobody else uses,
    without `losses` and `wsgi`."""

    fleets: tuple[Fleet, ...] = (
        Fleet(0),
        Fleet(1, idle_seconds=0, status_calls=10, kills=0),
        Fleet(10),
        Fleet(100, rounds=3),
        Fleet(1000, status_calls=3, stop_command=False, end_seconds=30.0),
        Fleet(3000, start_seconds=120.0, status_calls=2, stop_command=False, end_seconds=30.0),
    )

    peers: tuple[str, ...] = ()
    """Only these beside procman, by title; none: all."""

    kills: int = 100
    """Of one program at a time, each measured."""

    kills_a_step: int = 10
    """Some managers take a second for each: so many of them run side by side, each with programs of its own."""

    log_rounds: int = 3

    log_seconds: float = 1.0
    """Length of one window of writing."""

    many_programs: int = 100
    """Programs that print at the same time, a megabyte a second each."""

    many_rounds: int = 3
    many_seconds: float = 2.5
    """Length of one window of that."""

    mode_rounds: int = 5
    """Of each mode of the log."""

    requests: int = 200
    """`status` requests in each round of `modes`."""

    reading_gb: float = 10.0
    """Size of the log that is read."""

    reading_calls: int = 15
    """Of each command that ends soon."""

    rpc_rounds: int = 3
    rpc_seconds: float = 2.0
    """Of one window of calls."""

    crashes: Mapping[int, int] = field(default_factory=lambda: {10: 2, 100: 1, 1000: 1, 3000: 1})
    """How often each manager is killed, by its number of programs."""

    crash_settle_seconds: float = 2.0
    """Between a recovery and the count of the programs."""

    short_reloads: int = 5
    short_requests: int = 4000
    """Of `reload`: one server only."""

    reloads: int = 20
    """Of `losses`: of each site, under load."""

    reload_requests: int = 50_000
    """At least so many meanwhile, for each contender and server."""

    wsgi_rounds: int = 7
    """Windows of each WSGI server."""

    wsgi_seconds: float = 2.0
    """Length of one."""

    def fleet(self, programs: int) -> Fleet:
        """That of so many programs; where there is none, with what the next smaller one does."""
        smaller = [each for each in self.fleets if each.programs <= programs] or list(self.fleets[:1])
        return replace(smaller[-1], programs=programs)


FULL = Plan()
QUICK = Plan(
    fleets=(Fleet(20, idle_seconds=1.0, status_calls=3, kills=2, print_mb=20.0, end_seconds=15.0),),
    kills=5, kills_a_step=5, log_rounds=1, log_seconds=0.5,
    many_programs=20, many_rounds=1, many_seconds=1.0, mode_rounds=2, requests=50, reading_gb=1.0, reading_calls=5,
    rpc_rounds=1, rpc_seconds=0.5,
    crashes={10: 1}, crash_settle_seconds=1.0, short_reloads=1, short_requests=500,
    reloads=3, reload_requests=3000, wsgi_rounds=3, wsgi_seconds=1.0,
)  # fmt: skip
TINY = Plan(
    fleets=(Fleet(2, idle_seconds=0.2, status_calls=1, kills=1, print_mb=1.0),),
    kills=2, kills_a_step=1, log_rounds=1, log_seconds=0.1,
    many_programs=2, many_rounds=1, many_seconds=0.2, mode_rounds=1, requests=2, reading_gb=0.01, reading_calls=2,
    rpc_rounds=1, rpc_seconds=0.1,
    crashes={10: 1}, crash_settle_seconds=0.3, short_reloads=1, short_requests=100,
    reloads=1, reload_requests=200, wsgi_rounds=1, wsgi_seconds=0.1,
)  # fmt: skip
