"""How much a run measures: numbers of programs, rounds and seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """Each field is what one run does; the defaults are the full run, below 3 minutes on 2 cores without `losses`."""

    programs: int = 100
    """Programs of the managers for boot, idle, memory, status and stop."""

    rounds: int = 3
    """How often each manager is started, in turn."""

    idle_seconds: float = 5.0
    """Length of one idle window: procman's default sampling falls once into 5 seconds."""

    status_calls: int = 10
    """In each round."""

    sigterm_rounds: int = 1
    """In how many rounds Supervisor is stopped by SIGTERM: with 100 programs that takes it up to a minute."""

    kills: int = 100
    """Of one program at a time, each measured."""

    kills_a_step: int = 10
    """Supervisor takes a second for each: so many run side by side, each with a program of its own."""

    log_rounds: int = 5

    log_seconds: float = 1.5
    """Length of one window of writing."""

    many_seconds: float = 10.0
    """Length of the window in which many programs write slowly."""

    requests: int = 200
    """`status` requests in each round of `modes`."""
    reading_gb: float = 10.0
    """Size of the log that is read."""

    reading_calls: int = 15
    """Of each command that ends soon."""

    reloads: int = 20
    """Of each site, under load."""

    reload_requests: int = 50_000
    """At least so many meanwhile, for each contender and server."""

    wsgi_rounds: int = 7
    """Windows of each WSGI server."""

    wsgi_seconds: float = 2.0
    """Length of one."""


FULL = Plan()
QUICK = Plan(
    programs=20, rounds=1, idle_seconds=2.0, status_calls=5, sigterm_rounds=0,
    kills=8, kills_a_step=4, log_rounds=2, log_seconds=0.5, many_seconds=4.0, requests=50, reloads=3,
    reload_requests=3000, reading_gb=1.0, reading_calls=5,
    wsgi_rounds=3, wsgi_seconds=1.0,
)  # fmt: skip
TINY = Plan(
    programs=2, rounds=1, idle_seconds=0.2, status_calls=2,
    kills=2, kills_a_step=1, log_rounds=1, log_seconds=0.1, many_seconds=0.2, requests=2, reloads=1,
    reload_requests=200, reading_gb=0.01, reading_calls=2,
    wsgi_rounds=1, wsgi_seconds=0.1,
)  # fmt: skip
