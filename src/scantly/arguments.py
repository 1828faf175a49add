"""Arguments of the public functions, checked when they are called: a wrong type is told like any other mistake."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin, runtime_checkable

from scantly.errors import ConfigError

__all__ = ["HasFolder", "checked"]

P = ParamSpec("P")
R = TypeVar("R")

_WORDS: dict[Any, str] = {
    bool: "True or False",
    dict: "a dictionary",
    float: "a number",
    int: "a whole number",
    str: "text",
    type(None): "None",
}
_PLAIN: dict[Any, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    bool: (lambda value: isinstance(value, bool) or type(value).__name__ == "bool", bool),  # NumPy's has this name
    int: (lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool), int),
    float: (lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool), float),
    Path: (lambda value: isinstance(value, os.PathLike), Path),
}
"""Types of which others are taken too: what fits, and what is made of it."""

_MANY = (Collection, Iterable, Sequence, list, tuple)
_LONGEST = 60


@runtime_checkable
class HasFolder(Protocol):
    """What lies in a folder: a :class:`~scantly.training.run.Run`, for functions that must not import it."""

    @property
    def folder(self) -> Path:
        """The folder."""


class _UnfitError(Exception):
    """A value that is not what a parameter's annotation says."""


def checked(**examples: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function check the types of its arguments against its annotations before it does anything.

    Whole numbers and numbers of NumPy are taken as Python's, any ``os.PathLike`` as a path; text is never taken for a
    number, nor for a list of letters. ``Annotated[X, "words"]`` is called by its words.

    Args:
        examples: Parameter -> what to write, for instance ``labeled="7 or '10%'"``; ends the sentence about it.

    Returns:
        A decorator. The function then raises :class:`~scantly.errors.ConfigError`, naming the argument, the value and
        what to give; missing and unknown arguments are Python's own ``TypeError``.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        scope = getattr(function, "__globals__", {})
        hints = {
            name: eval(parameter.annotation, scope) if isinstance(parameter.annotation, str) else parameter.annotation
            for name, parameter in signature.parameters.items()
            if parameter.annotation is not inspect.Parameter.empty
        }

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python's own message names the function
            for name, value in bound.arguments.items():
                if name in hints:
                    try:
                        bound.arguments[name] = _fitted(value, hints[name])
                    except _UnfitError:
                        where = function.__qualname__
                        raise ConfigError(_sentence(where, name, value, hints[name], examples.get(name))) from None
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _sentence(where: str, name: str, value: Any, hint: Any, example: str | None) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
    also = f", for instance {example}" if example else ""
    if Path in _parts(hint) and not isinstance(value, str | os.PathLike) and hasattr(value, "folder"):
        also += "; the path of a run is its .folder"
    return f"{where}: {name} is {shown} ({type(value).__name__}); give {_words(hint)}{also}."


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _words(hint: Any) -> str:
    """What an annotation asks for."""
    parts = list(_parts(hint))
    words = []
    if str in parts and Path in parts:
        words.append("a path (text or pathlib.Path)")
        parts = [part for part in parts if part not in (str, Path)]
    words += [_word(part) for part in parts if part is not type(None)]
    words += ["None"] if type(None) in parts else []
    return ", ".join(words[:-1]) + (" or " if len(words) > 1 else "") + words[-1]


def _word(part: Any) -> str:
    origin, inner = get_origin(part), get_args(part)
    if origin is Annotated:
        return str(inner[1])
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in _MANY:
        return f"a list, each item of it {_words(inner[0])}"
    if origin in (Mapping, dict):
        return "a dictionary"
    if origin is Callable:
        return "a function"
    return _WORDS.get(part, f"a {getattr(part, '__name__', part)}")


def _fitted(value: Any, hint: Any) -> Any:
    """The value as the annotation wants it.

    Raises:
        _UnfitError: if it is something else.
    """
    for part in _parts(hint):
        try:
            return _fitted_to_one(value, part)
        except _UnfitError:
            continue
    raise _UnfitError


def _fitted_to_one(value: Any, part: Any) -> Any:
    if get_origin(part) is Annotated:
        return _fitted(value, get_args(part)[0])
    origin, inner = get_origin(part), get_args(part)
    if origin in _MANY:
        return _fitted_items(value, origin, inner[0])
    if origin is Mapping:
        _require(isinstance(value, Mapping))
        return {_fitted(key, inner[0]): _fitted(item, inner[1]) for key, item in value.items()}
    if part in _PLAIN:
        fits, made = _PLAIN[part]
        _require(fits(value))
        return made(value)
    if origin is Literal:
        _require(isinstance(value, str | int | None) and value in inner)
    elif origin is Callable:
        _require(callable(value))
    elif origin is dict:  # one that is filled: the caller's own, not a copy
        _require(isinstance(value, dict))
    elif part is not Any:
        _require(isinstance(value, part))
    return value


def _fitted_items(value: Any, origin: Any, item: Any) -> list[Any]:
    """A list of the items; text and dictionaries are none, whatever Python says."""
    wanted = Iterable if origin is Iterable else Sequence
    array = hasattr(value, "tolist")
    _require(isinstance(value, wanted) or array)
    _require(not isinstance(value, str | bytes | Mapping | os.PathLike))
    try:
        return [_fitted(one, item) for one in (value.tolist() if array else value)]
    except TypeError:  # an array of no dimensions
        raise _UnfitError from None


def _require(holds: bool) -> None:
    if not holds:
        raise _UnfitError
