"""Typed settings: unknown keys are refused with the nearest known one, all faults at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from scantly.errors import ConfigError, unknown_name

__all__ = ["Settings", "merge", "parse"]


class Settings(BaseModel):
    """Base of every settings class: immutable, no unknown keys, defaults validated.

    Every field is documented with ``Field(..., description=...)`` including its unit; defaults live here
    and nowhere else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)

_LIST = 'write a list, for instance ["a", "b"]'
_OBJECT = "write an object, that is settings with names"
#: pydantic's types of faults -> what to do, in the words of JSON and YAML.
_WORDS = {
    "dict_type": _OBJECT,
    "list_type": _LIST,
    "model_type": _OBJECT,
    "string_type": "write text, in quotation marks",
    "tuple_type": _LIST,
}


def parse(model: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Build settings from plain data.

    Args:
        model: The settings class.
        values: Plain data, for instance read from YAML.
        where: Prefix of the keys in messages, for instance ``"method"`` or a file name.

    Returns:
        The validated settings.

    Raises:
        ConfigError: naming every fault: the key, the value received and what is expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        faults = [_sentence(model, fault, where) for fault in error.errors()]
        raise ConfigError("\n".join(faults)) from None


def _sentence(model: type[Settings], fault: Any, where: str) -> str:
    path = [str(part) for part in fault["loc"]]
    key = ".".join([where, *path] if where else path)
    if fault["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        known = list(owner.model_fields) if owner else []
        return unknown_name("setting", key, [".".join([*key.split(".")[:-1], name]) for name in known])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"setting '{key}' is missing; give it a value."
    if fault["type"] in _WORDS:
        return f"setting '{key}' is {fault['input']!r}: {_WORDS[fault['type']]}."
    return f"setting '{key}' is {fault['input']!r}: {message[0].lower()}{message[1:]}."


def _model_at(model: type[Settings], path: list[str]) -> type[Settings] | None:
    current: type[Settings] = model
    for part in path:
        field = current.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, Settings)):
            return None
        current = annotation
    return current


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, later ones win key by key; lists and scalars are replaced whole.

    Example:
        >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            present = merged.get(key)
            if isinstance(present, Mapping) and isinstance(value, Mapping):
                merged[key] = merge(present, value)
            elif isinstance(value, Mapping):
                merged[key] = merge(value)
            else:
                merged[key] = value
    return merged
