"""What `benchmark.py` measures, a module a kind."""
