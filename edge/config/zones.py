"""Time zones, by the names of the IANA database (RFC 6557)."""

from datetime import UTC, tzinfo
from zoneinfo import ZoneInfo


def zone_of(name: str) -> tzinfo:
    """Return the time zone of a name; raises `ValueError` for one that is not known on this machine."""
    if name == "UTC":  # which needs no database
        return UTC
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError):
        hint = 'write one such as "Asia/Shanghai", and install tzdata where no zone is known'
        raise ValueError(f"{name!r} is no time zone of this machine: {hint}") from None


def check_zone(name: str) -> None:
    """Raise `ValueError` for a time zone that is not known."""
    zone_of(name)
