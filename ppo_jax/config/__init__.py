"""Settings: frozen dataclasses, checked before anything is allocated.

`run` is the whole config, `stages` its sections, `mesh` the device mesh, `parsing` makes them of
a dict, `flags` reads the command line, `points` those of a sweep. Imports `core` and `models`.
Start with `run`, then `stages`.
"""

from ppo_jax.config.run import Config, from_config_dict, with_defaults

__all__ = ["Config", "from_config_dict", "with_defaults"]
