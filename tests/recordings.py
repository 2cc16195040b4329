"""What real engines sent, as `python -m tests.engines --record` keeps it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "cases/engines"


@dataclass(frozen=True)
class Recording:
    """One answer. `counted`: what the engine's counters went up by, of prompt and answer; None of one without."""

    engine: str
    case: str
    mode: str
    path: str
    request: dict[str, Any]
    status: int
    content_type: str
    answer: str
    counted: tuple[int, int] | None

    @property
    def operation(self) -> str:
        return self.path.removeprefix("/v1/")

    @property
    def is_stream(self) -> bool:
        return self.content_type.startswith("text/event-stream")

    @property
    def name(self) -> str:
        return f"{self.engine}: {self.case}, {self.mode}"


def _of(file: Path) -> list[Recording]:
    kept = json.loads(file.read_text())["recordings"]
    return [Recording(file.stem, **each | {"counted": each["counted"] and tuple(each["counted"])}) for each in kept]


RECORDINGS = [each for file in sorted(FOLDER.glob("*.json")) for each in _of(file)]
ANSWERS = [each for each in RECORDINGS if each.status == 200]
