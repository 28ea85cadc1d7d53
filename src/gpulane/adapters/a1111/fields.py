"""Reads the fields of a body as FastAPI with pydantic 1 would, without decoding what is not needed.

A body may hold 20 MB of base64 pictures: it is split into raw fields, of which only small ones are decoded.
What the engine would refuse with 422 is refused here, in the same words, before it waits for a gpu.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, cast

import msgspec

from gpulane.adapters.a1111.errors import Invalid, Problem

Body = dict[str, msgspec.Raw]
"""A body split into fields. Re-encoding it keeps every field's bytes."""

FIELD_BYTES_DECODED_MAX: Final = 1 << 20
"""Larger fields are pictures, whatever their name: only their first byte is looked at."""


class Kind(StrEnum):
    """Types of fields."""

    INT = "integer"
    FLOAT = "float"
    BOOL = "bool"
    STR = "str"
    LIST = "list"
    DICT = "dict"


_MESSAGES: Final[Mapping[Kind, tuple[str, str]]] = {
    Kind.INT: ("value is not a valid integer", "type_error.integer"),
    Kind.FLOAT: ("value is not a valid float", "type_error.float"),
    Kind.BOOL: ("value could not be parsed to a boolean", "type_error.bool"),
    Kind.STR: ("str type expected", "type_error.str"),
    Kind.LIST: ("value is not a valid list", "type_error.list"),
    Kind.DICT: ("value is not a valid dict", "type_error.dict"),
}
_TRUE: Final = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE: Final = frozenset({"0", "off", "f", "false", "n", "no"})
_FIRST_BYTES: Final[Mapping[Kind, int]] = {Kind.STR: ord('"'), Kind.LIST: ord("["), Kind.DICT: ord("{")}


def split(body: bytes) -> Body:
    """Split a JSON object into raw fields; an empty body is an empty object. Raises Invalid, NaN and Infinity
    included.
    """
    if not body.strip():
        return {}
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise Invalid(_problem(("body",), Kind.DICT)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Python's json, and so the engine, takes NaN; the sampler then paints black pictures or dies.
        raise Invalid(Problem(loc=("body", 0), msg=f"{error}", type="value_error.jsondecode")) from None
    return fields


def join(fields: Body) -> bytes:
    """Put the fields together again."""
    return msgspec.json.encode(fields)


@dataclass(slots=True, kw_only=True)
class Reader:
    """Reads fields and gathers what is wrong with them, so that one answer tells all."""

    fields: Body
    problems: list[Problem] = field(default_factory=list[Problem])

    def integer(self, name: str, default: int, *, low: int | None = None, high: int | None = None) -> int:
        """Read an integer; `low` and `high` are what makes sense, in the engine or for our limits."""
        value = self._value(name, Kind.INT)
        number = default if value is None else int(cast("int", value))
        if value is not None:
            self._check_range(name, number, low, high)
        return number

    def number(
        self, name: str, default: float, *, low: float | None = None, high: float | None = None
    ) -> float:
        """Read a number."""
        value = self._value(name, Kind.FLOAT)
        number = default if value is None else float(cast("float", value))
        if value is not None:
            self._check_range(name, number, low, high)
        return number

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Read a boolean."""
        value = self._value(name, Kind.BOOL)
        return default if value is None else bool(value)

    def text(self, name: str) -> str | None:
        """Read a string; None when it is missing, null, or too big to be more than a picture."""
        return cast("str | None", self._value(name, Kind.STR))

    def items(self, name: str) -> list[msgspec.Raw] | None:
        """Read a list, its items raw."""
        return cast("list[msgspec.Raw] | None", self._value(name, Kind.LIST))

    def object(self, name: str) -> Body | None:
        """Read an object, its values raw."""
        return cast("Body | None", self._value(name, Kind.DICT))

    def check(self, name: str, kind: Kind) -> None:
        """Check a field's type and forget its value."""
        self._value(name, kind)

    def finish(self) -> None:
        """Raise what was found wrong."""
        if self.problems:
            # A field may have been read more than once.
            raise Invalid(*dict.fromkeys(self.problems))

    def _value(self, name: str, kind: Kind) -> object:
        raw = self.fields.get(name)
        if raw is None:
            return None
        try:
            return _coerced(raw, kind) if len(memoryview(raw)) <= FIELD_BYTES_DECODED_MAX else _big(raw, kind)
        except (ValueError, TypeError, msgspec.DecodeError, OverflowError, RecursionError):
            self.problems.append(_problem(("body", name), kind))
            return None

    def _check_range(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if low is not None and value < low:
            problem = (f"ensure this value is greater than or equal to {low:g}", "value_error.number.not_ge")
        elif high is not None and value > high:
            problem = (f"ensure this value is less than or equal to {high:g}", "value_error.number.not_le")
        else:
            return
        self.problems.append(Problem(loc=("body", name), msg=problem[0], type=problem[1]))


def _big(raw: msgspec.Raw, kind: Kind) -> object:
    """Check the type of a big field by its first byte; a string of this size is not decoded at all."""
    first = _FIRST_BYTES.get(kind)
    if first is None or memoryview(raw)[0] != first:
        raise TypeError
    match kind:
        case Kind.LIST:
            return msgspec.json.decode(raw, type=list[msgspec.Raw])
        case Kind.DICT:
            return msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        case _:
            return None


def _coerced(raw: msgspec.Raw, kind: Kind) -> object:
    """Decode as pydantic 1 coerces: numbers out of strings, strings out of numbers. None for null."""
    match kind:
        case Kind.LIST:
            return msgspec.json.decode(raw, type=list[msgspec.Raw] | None)
        case Kind.DICT:
            return msgspec.json.decode(raw, type=dict[str, msgspec.Raw] | None)
        case _:
            value: object = msgspec.json.decode(raw)
    if value is None:
        return None
    if isinstance(value, (list, dict)):
        raise TypeError
    match kind:
        case Kind.STR:
            return str(value)
        case Kind.BOOL:
            return _boolean(str(value).lower())
        case Kind.INT:
            return int(cast("str | float", value))
        case Kind.FLOAT:
            number = float(cast("str | float", value))
            if not math.isfinite(number):
                raise ValueError
            return number


def _boolean(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError


def _problem(loc: tuple[str | int, ...], kind: Kind) -> Problem:
    message, name = _MESSAGES[kind]
    return Problem(loc=loc, msg=message, type=name)
