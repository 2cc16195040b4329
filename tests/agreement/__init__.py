"""Whether `loadtest run` and the benchmarks of others tell the same of the same server. By hand: see `__main__`."""
