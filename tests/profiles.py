"""How many examples a property is tried with: few in CI, many with `--hypothesis-profile=deep`."""

from hypothesis import HealthCheck, settings

SUITE = "suite"
DEEP = "deep"

# On a busy machine nothing is as fast as these would have it.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile(SUITE, deadline=None, database=None, print_blob=True, suppress_health_check=_SLOW)
settings.register_profile(DEEP, settings.get_profile(SUITE), max_examples=10_000)


def examples(count: int) -> settings:
    """Return settings for a property that costs more or less than others; `deep` tries all of them as often."""
    is_deep = settings.get_current_profile_name() == DEEP
    return settings(max_examples=settings.get_profile(DEEP).max_examples if is_deep else count)
