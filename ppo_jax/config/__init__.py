"""Settings: frozen dataclasses, checked before anything is allocated.

`run` is the whole config, `stages` its sections, `mesh` the device mesh, `parsing` makes them of
a dict, `flags` reads the command line. Imports `core` and `models`.
Start with `run`, then `stages`.
"""
