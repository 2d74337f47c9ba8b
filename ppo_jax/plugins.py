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
        raise ValueError(f"{field} must be 'module:function', got {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"{field} must name a function, got {name!r}, which is {function!r}")
    return function
