"""What stands beside ours in `benchmark.py grid`; each script runs in an environment of its own."""
