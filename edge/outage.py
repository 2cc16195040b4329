"""Something that is down: logged once, and once more when it is back."""

import logging


class Outage:
    """Whether one thing that the process needs is down, and why.

    `log` is the logger of the part that needs it; `is_down` and `is_back` are its sentences there, the first with the
    reason behind a colon.
    """

    __slots__ = ("_is_back", "_is_down", "_log", "reason")

    def __init__(self, log: logging.Logger, is_down: str, is_back: str) -> None:
        self.reason = ""  # why it is down, "" while it is up
        self._log = log
        self._is_down = is_down
        self._is_back = is_back

    def __bool__(self) -> bool:
        """Whether it is down."""
        return bool(self.reason)

    def down(self, reason: str, level: int = logging.ERROR) -> None:
        """Note that it is down; only the first call of an outage is logged, later ones replace the reason."""
        if not self.reason:
            self._log.log(level, "%s: %s", self._is_down, reason)
        self.reason = reason

    def up(self, level: int = logging.WARNING) -> None:
        """Note that it is up; logged only behind an outage."""
        if self.reason:
            self.reason = ""
            self._log.log(level, "%s", self._is_back)
