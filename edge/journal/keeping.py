"""Journal files that may go: old enough, and delivered whole as the notes beside them prove."""

import contextlib
from pathlib import Path

from edge.errors import Unusable
from edge.journal import files
from edge.journal.index import UsageIndex
from edge.journal.spent import SpentIndex


def delete_shipped(directory: Path, keep_s: float, now: float) -> int:
    """Delete the files that were written last more than `keep_s` ago and are delivered; return how many.

    The indexes have what they say before they go: none goes while another process brings one up to date. What nobody
    noted as delivered stays: that of an edge without a sink, or of one that kept no notes. Raises `OSError`, once all
    was tried.
    """
    for index in (UsageIndex(directory), SpentIndex(directory, lambda: now)):
        if (directory / index.name).exists():
            with contextlib.suppress(Unusable):  # an index that is broken holds nothing up
                if not index.catch_up():
                    return 0
    deleted, failure = 0, None
    for token, numbers in files.all_file_numbers(directory).items():
        try:
            position = files.load_position(directory, token)
        except files.LeftAlone:  # of a newer edge
            continue
        if position is None:
            continue
        is_done = not (directory / f"{token}.lock").exists()
        left = len(numbers)
        for number in numbers:
            path = files.file_path(directory, token, number)
            try:
                status = path.stat()
                end = files.Position(number, status.st_size)
                is_delivered = number < position.number or (is_done and end <= position)
                if is_delivered and status.st_mtime < now - keep_s:
                    path.unlink()
                    deleted += 1
                    left -= 1
            except FileNotFoundError:  # another process was faster
                continue
            except OSError as error:
                failure = failure or error
        if is_done and not left:
            files.position_path(directory, token).unlink(missing_ok=True)
    if failure is not None:
        raise failure
    return deleted
