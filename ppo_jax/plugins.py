"""Functions of the user's own, named in a config as "module:function"."""

import importlib
import os
import sys
from collections.abc import Callable


def load_function(name: str, field: str) -> Callable:
    """The function that "module:function" names; modules of the current folder are found.

    Raises:
        ValueError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, SyntaxError, AttributeError, ValueError) as error:
        told = f"{field} must be 'module:function', got {name!r}: {error}{hint(name)}"
        raise ValueError(told) from error
    if not callable(function):
        raise ValueError(f"{field} must name a function, got {name!r}, which is {function!r}")
    return function


def hint(name: str) -> str:
    """How to write what looks like a file, or has a dot for the colon; "" for anything else.

    >>> hint("rewards/mine.py:score")
    '; write it as module:function, e.g. rewards.mine:score'
    >>> hint("mine.score")
    '; write it as module:function, e.g. mine:score'
    >>> hint("mine:score")
    ''
    """
    module, _, function = name.partition(":")
    if not function and not name.endswith(".py"):
        module, _, function = name.rpartition(".")
    module = module.removesuffix(".py").replace("/", ".").strip(".")
    better = f"{module}:{function or 'score'}"
    return f"; write it as module:function, e.g. {better}" if module and better != name else ""
