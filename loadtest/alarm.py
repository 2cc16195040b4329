"""Wake at an exact time: timers of event loops tick in milliseconds, more than a proxy adds to an answer (Linux)."""

import asyncio
import ctypes
import os
import time
from typing import Final

_ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME, timerfd_create(2)
_EXPIRATIONS_BYTES: Final = 8


class _Time(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Timer(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


class Alarm:
    """A timer of the kernel; one waits at a time. Raises `OSError` when there is none to be had."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # `os.timerfd_create` comes with Python 3.13.
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._rung: asyncio.Future[None] | None = None
        self._loop.add_reader(self._timer, self._ring)

    async def until(self, at: float) -> None:
        """Return at the time `at` of `time.monotonic`; when that is past, after everybody else had a turn."""
        if at <= time.monotonic():
            await asyncio.sleep(0)
            return
        self._rung = self._loop.create_future()
        seconds = int(at)
        when = _Timer(_Time(0, 0), _Time(seconds, int((at - seconds) * 1e9)))
        self._libc.timerfd_settime(self._timer, _ABSOLUTE, ctypes.byref(when), None)
        await self._rung

    def close(self) -> None:
        """Give the timer back."""
        self._loop.remove_reader(self._timer)
        os.close(self._timer)

    def _ring(self) -> None:
        os.read(self._timer, _EXPIRATIONS_BYTES)
        if self._rung is not None and not self._rung.done():
            self._rung.set_result(None)
