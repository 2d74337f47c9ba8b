"""The subcommands of `benchmark.py`."""
