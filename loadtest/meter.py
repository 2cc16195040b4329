"""What a load cost: CPU of the proxy and the rig, and whether the machine kept still meanwhile."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from loadtest import processes

_MAX_STEAL: Final = 0.02
_MAX_RIG_BUSY: Final = 0.8
_SATURATED: Final = 0.9


class Meter:
    """What the spans of `with` cost: the proxy's CPU, how busy proxy and rig were, and whether the machine kept still.

    `pids` is the proxy's whole process tree, `rig_pids` the processes of each core of the rig. Entered more than once
    it adds up; `last_cpu_s` is the proxy's share of the last span.
    """

    def __init__(self, pids: Sequence[int], rig_pids: Sequence[Sequence[int]]) -> None:
        self._pids, self._rig_pids = pids, rig_pids
        self._from: tuple[float, float, list[float], float, float, int] = (0.0, 0.0, [], 0.0, 0.0, 0)
        self.last_cpu_s = self.cpu_s = self.elapsed_s = 0.0
        self._rig_s = [0.0] * len(rig_pids)
        self._steal_s = self._all_s = 0.0
        self.major_faults = 0

    def _now(self) -> tuple[float, float, list[float], float, float, int]:
        steal, total = processes.steal_and_total_s()
        rig = [processes.cpu_s(pids) for pids in self._rig_pids]
        cpu, faults = processes.cpu_s(self._pids), processes.major_faults(self._pids)
        return time.monotonic(), cpu, rig, steal, total, faults

    def __enter__(self) -> Self:
        self._from = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        before, after = self._from, self._now()
        self.elapsed_s += after[0] - before[0]
        self.last_cpu_s = after[1] - before[1]
        self.cpu_s += self.last_cpu_s
        self._rig_s = [sum + new - old for sum, new, old in zip(self._rig_s, after[2], before[2], strict=True)]
        self._steal_s += after[3] - before[3]
        self._all_s += after[4] - before[4]
        self.major_faults += after[5] - before[5]

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
        return f"{self.major_faults} major faults" if self.major_faults else ""
