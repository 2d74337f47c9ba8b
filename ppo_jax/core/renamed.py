"""Keyword arguments with a new name: the old one works for one release, with a warning."""

import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any


def renamed(**names: str) -> Callable[[Any], Any]:
    """Decorator of a function, or of a class with keyword fields, that takes old names as well.

    An instance has the old names as attributes, too.

    Args:
        names: old name = "new name".

    Raises:
        TypeError: at a call of a function that gives both. For a class the old name wins, since
            `dataclasses.replace` gives every field.

    >>> import warnings
    >>> @renamed(kind="estimator")
    ... def estimate(x, *, estimator="k1"):
    ...     return f"{estimator}({x})"
    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...     estimate("x", kind="k2"), str(caught[0].message)
    ('k2(x)', 'estimate: kind is now estimator; the old name goes with the next release')
    """

    def decorate(target):
        call = target.__init__ if isinstance(target, type) else target

        @functools.wraps(call)
        def wrapped(*args, **kwargs):
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs and target is call:
                    raise TypeError(f"{target.__name__}: {old} is now {new}, got both")
                message = f"{target.__name__}: {old} is now {new}; the old name goes with the next"
                warnings.warn(f"{message} release", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return call(*args, **kwargs)

        if not isinstance(target, type):
            return wrapped
        target.__init__ = wrapped
        for old, new in names.items():
            setattr(target, old, property(operator.attrgetter(new)))
        return target

    return decorate
