"""Whether a request may start now."""
