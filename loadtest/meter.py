"""What a load cost: CPU of the proxy and the rig, and whether the machine kept still meanwhile."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from loadtest import processes

_MAX_STEAL: Final = 0.02
_MAX_FOREIGN: Final = 0.03  # of the cores; the kernel's own threads take up to 1 %
_MIN_FOREIGN_S: Final = 0.05  # the kernel counts in ticks of 10 ms, here of two cores, at both ends
_MAX_RIG_BUSY: Final = 0.8
_SATURATED: Final = 0.9


@dataclass(frozen=True, slots=True)
class _Reading:
    """What was counted up to a moment, in seconds and page faults; `busy_s` is what all programs ran on the cores."""

    at: float
    cpu_s: float
    rig_s: Sequence[float]
    busy_s: float
    steal_s: float
    all_s: float
    major_faults: int


class Meter:
    """What the spans of `with` cost: the proxy's CPU, how busy proxy and rig were, and whether the machine kept still.

    `pids` is the proxy's whole process tree, `rig_pids` the processes of each core of the rig. Entered more than once
    it adds up; `last_cpu_s` is the proxy's share of the last span.
    """

    def __init__(self, pids: Sequence[int], rig_pids: Sequence[Sequence[int]]) -> None:
        self._pids, self._rig_pids = pids, rig_pids
        self._cores = processes.cores_of([*pids, *(pid for each in rig_pids for pid in each)])
        self._from: _Reading | None = None
        self.last_cpu_s = self.cpu_s = self.elapsed_s = 0.0
        self._rig_s = [0.0] * len(rig_pids)
        self._busy_s = self._steal_s = self._all_s = 0.0
        self.major_faults = 0

    def _now(self) -> _Reading:
        steal_s, all_s = processes.steal_and_total_s()
        return _Reading(
            time.monotonic(),
            processes.cpu_s(self._pids),
            [processes.cpu_s(pids) for pids in self._rig_pids],
            processes.busy_s(self._cores),
            steal_s,
            all_s,
            processes.major_faults(self._pids),
        )

    def __enter__(self) -> Self:
        self._from = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        before, after = self._from, self._now()
        assert before is not None
        self.elapsed_s += after.at - before.at
        self.last_cpu_s = after.cpu_s - before.cpu_s
        self.cpu_s += self.last_cpu_s
        self._rig_s = [sum + new - old for sum, new, old in zip(self._rig_s, after.rig_s, before.rig_s, strict=True)]
        self._busy_s += after.busy_s - before.busy_s
        self._steal_s += after.steal_s - before.steal_s
        self._all_s += after.all_s - before.all_s
        self.major_faults += after.major_faults - before.major_faults

    @property
    def foreign(self) -> float:
        """The share of the cores of proxy and rig that somebody else used; 0 where that is within the error."""
        foreign_s = self._busy_s - self.cpu_s - sum(self._rig_s)
        return foreign_s / (self.elapsed_s * len(self._cores)) if foreign_s > _MIN_FOREIGN_S else 0.0

    @property
    def steal(self) -> float:
        """The share of the machine that a hypervisor took away."""
        return self._steal_s / self._all_s if self._all_s else 0.0

    @property
    def proxy_busy(self) -> float:
        """The share of a core that the proxy used."""
        return self.cpu_s / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def rig_busy(self) -> float:
        """The share of its core that the rig used, of its busiest core."""
        return max(self._rig_s) / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def rig_bound(self) -> bool:
        """Whether the rig was the limit, not the proxy."""
        return bool(self._pids) and self.rig_busy > _MAX_RIG_BUSY and self.proxy_busy < _SATURATED

    @property
    def saturated(self) -> bool:
        """Whether the proxy had no time left."""
        return self.proxy_busy > _SATURATED

    @property
    def unfit(self) -> str:
        """Why the round does not count, empty when it does."""
        if self.steal > _MAX_STEAL:
            return f"steal {self.steal:.1%}"
        if self.foreign > _MAX_FOREIGN:
            return f"another program took {self.foreign:.1%} of the cores"
        return f"{self.major_faults} major faults" if self.major_faults else ""
