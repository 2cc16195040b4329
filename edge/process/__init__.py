"""The process: start, reload, drain."""
