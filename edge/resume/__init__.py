"""A stream that broke, and goes on: what was said, what may be asked of a sibling, and what of its answer is new."""
