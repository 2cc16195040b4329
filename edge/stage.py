"""How far the process is with its end: one value, which only grows."""

import enum
from dataclasses import dataclass


class Stage(enum.IntEnum):
    """A stage of the process; the process alone moves on to the next one."""

    RUNNING = 0
    DRAINING = 1  # not ready; each answer that begins is the last of its connection, and its head says so
    CLOSING = 2  # the listeners are closed; a connection that may still get a request stays for two seconds
    CUTTING = 3  # the drain is over: who is cut now did not leave by itself


@dataclass(slots=True)
class Lifecycle:
    """Holds the stage; its owner writes it, everybody else reads it."""

    stage: Stage = Stage.RUNNING
