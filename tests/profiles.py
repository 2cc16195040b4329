"""How many examples a property is tried with: few in CI, many with `--hypothesis-profile=deep`."""

from hypothesis import settings

SUITE = "suite"
DEEP = "deep"

settings.register_profile(SUITE, deadline=None, database=None, print_blob=True)
settings.register_profile(DEEP, settings.get_profile(SUITE), max_examples=10_000)


def examples(count: int) -> settings:
    """Return settings for a property that costs more or less than others; `deep` tries all of them as often."""
    is_deep = settings.get_current_profile_name() == DEEP
    return settings(max_examples=settings.get_profile(DEEP).max_examples if is_deep else count)
