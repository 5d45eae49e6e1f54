"""The short form of `python -m tests.guarantees kill`."""

from __future__ import annotations

import pytest

from tests.guarantees.kill import Options, run


@pytest.mark.timeout(240)
def test_killed_again_and_again_under_load() -> None:
    """Slower than the long form, so that a busy machine is fast enough."""
    result = run(Options(seconds=6, connections=4, rate=10, megabytes=10, calibrate=2))
    assert not result.problems, "\n".join((*result.lines(), *result.problems))
    assert result.kills > 1
    assert result.supervisors == result.kills + 1
    assert result.files > 1, "the log was rotated meanwhile"
