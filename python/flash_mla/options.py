"""Options of calls as Python's own numbers and flags; errors name them."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

from . import frameworks

_TEXTS = (str, bytes, bytearray)
_BOOLS = ("bool", "bool_")  # Python's and NumPy's


def number(name: str, value: Any) -> float:
    """The value as a float, infinite for an integer that no float can hold.

    Raises
    ------
    TypeError
        for what isn't one number. A text isn't, whatever it says, nor is a bool, which is a flag out of its place.
    """
    is_other = type(value) is not float and (issubclass(type(value), _TEXTS) or type(value).__name__ in _BOOLS)
    try:
        if not is_other:
            return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name}: expected a number, got {type(value).__qualname__}")


def integer(name: str, value: Any) -> int:
    """The value as an int. A compiler's symbol stays one.

    Raises
    ------
    TypeError
        for what isn't one integer.
    ValueError
        for an integer that 64 bits can't hold.
    """
    if frameworks.is_read_by_dynamo() and (type(value) is int or hasattr(value, "__index__")):
        return value  # type: ignore[no-any-return]
    if type(value) is not int:
        if isinstance(value, getattr(sys.modules.get("torch"), "SymInt", ())):
            return value  # type: ignore[return-value]
        try:
            value = operator.index(value)
        except (TypeError, RuntimeError):
            raise TypeError(f"{name}: expected an integer, got {type(value).__qualname__}") from None
    if -(2**63) <= value < 2**63:
        return value  # type: ignore[no-any-return]
    raise ValueError(f"{name}: expected an integer of 64 bits, got one of {value.bit_length() + 1}")


def flag(name: str, value: Any) -> bool:
    """The value as a bool.

    Raises
    ------
    TypeError
        for what isn't true or false, as an array of several values, or a text.
    """
    try:
        if type(value) is bool or not issubclass(type(value), _TEXTS):
            return bool(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name}: expected a bool, got {type(value).__qualname__}")
