"""Whether the numbers of a run are the target's."""

import errno
import os

from loadtest.judgement import void


def test_a_generator_that_was_late_or_had_no_time_left_makes_the_run_void() -> None:
    fine = {
        "generator_lag_p99_ms": 9.0,
        "generator_busy": 0.5,
        "generator_waited": 0.01,
        "machine_steal": 0.01,
        "duration": 10.0,
        "error_counts": {},
    }
    own = {f"connect: {os.strerror(errno.EMFILE)}": 3}
    assert len(void(fine | {"error_counts": own})) == 1
    assert void(fine) == []
    assert len(void(fine | {"generator_lag_p99_ms": 11.0})) == 1
    assert len(void(fine | {"generator_busy": 0.95})) == 1
    assert void(fine | {"generator_busy": 0.95, "duration": 1.0}) == []
    assert "server or another program" in void(fine | {"generator_waited": 0.05})[0]
    assert "hypervisor took 4%" in void(fine | {"machine_steal": 0.04})[0]
