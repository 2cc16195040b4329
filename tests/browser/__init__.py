"""The status page in a real browser: by hand, as CI has none."""
