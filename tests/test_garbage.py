"""No look for garbage, and as before behind that."""

import gc

from edge.garbage import no_collection


def test_collection_is_off_within_and_as_it_was_behind() -> None:
    was_enabled = gc.isenabled()
    try:
        for before in (True, False):
            (gc.enable if before else gc.disable)()
            with no_collection():
                assert not gc.isenabled()
            assert gc.isenabled() is before
    finally:
        (gc.enable if was_enabled else gc.disable)()
