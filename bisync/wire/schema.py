"""What may stand in a message, and how much of it: values of ours to plain ones, and back.

A schema knows its values' types, ranges and sizes. What comes from the peer is taken apart by it
and by nothing else: no name, number or list reaches the engine that its schema does not allow.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NoReturn, Protocol

from msgspec import Struct

from bisync.core.path import valid_name
from bisync.errors import ProtocolError

I64 = 2**63
Plain = Any
"""``None``, bool, int, bytes, str, and lists and dicts of them."""


class Schema(Protocol):
    """One kind of value."""

    def pack(self, value: Any) -> Plain:
        """As plain values."""
        ...

    def unpack(self, plain: Plain) -> Any:
        """From plain values.

        Raises:
            ProtocolError: the schema does not allow them.
        """
        ...


def refuse(what: str) -> NoReturn:
    """The peer sent what it must not."""
    raise ProtocolError(f"the peer sent what no message holds: {what}")


class Int(Struct, frozen=True):
    """A whole number, both ends included."""

    low: int = -I64
    high: int = I64 - 1

    def pack(self, value: int) -> Plain:
        """As it is; nothing is rounded."""
        return operator.index(value)

    def unpack(self, plain: Plain) -> int:
        """As it is, within its range."""
        if type(plain) is not int or not self.low <= plain <= self.high:
            refuse(f"a number from {self.low} to {self.high} was due")
        return plain


class Time(Struct, frozen=True):
    """Nanoseconds since 1970; what does not fit 64 bits as seconds and nanoseconds."""

    def pack(self, value: int) -> Plain:
        """As it is, or as a pair."""
        return value if -I64 <= value < I64 else list(divmod(value, 10**9))

    def unpack(self, plain: Plain) -> int:
        """From either."""
        if type(plain) is list and len(plain) == 2:
            seconds, rest = Int().unpack(plain[0]), Int(0, 10**9 - 1).unpack(plain[1])
            return seconds * 10**9 + rest
        return Int().unpack(plain)


class Bool(Struct, frozen=True):
    """Yes or no."""

    def pack(self, value: bool) -> Plain:
        """As it is."""
        return bool(value)

    def unpack(self, plain: Plain) -> bool:
        """As it is."""
        if type(plain) is not bool:
            refuse("yes or no was due")
        return plain


class Bytes(Struct, frozen=True):
    """So many bytes."""

    most: int
    least: int = 0

    def pack(self, value: bytes) -> Plain:
        """As they are."""
        return bytes(value)

    def unpack(self, plain: Plain) -> bytes:
        """As they are."""
        if type(plain) is not bytes or not self.least <= len(plain) <= self.most:
            refuse(f"{self.least} to {self.most} bytes were due")
        return plain


class NoNul(Bytes, frozen=True):
    """So many bytes, none of them zero: what the system takes for a path or a name."""

    def unpack(self, plain: Plain) -> bytes:
        """As they are."""
        found = Bytes.unpack(self, plain)
        if b"\0" in found:
            refuse("a zero byte in a name")
        return found


class Text(Struct, frozen=True):
    """Text for people: so many characters. Never a name."""

    most: int = 4096

    def pack(self, value: str) -> Plain:
        """Cut to what may be sent."""
        return value[: self.most].encode("utf-8", "replace").decode()

    def unpack(self, plain: Plain) -> str:
        """As it is; what a terminal might obey is shown as what it is."""
        if type(plain) is not str or len(plain) > self.most:
            refuse(f"a text of up to {self.most} characters was due")
        if plain.isprintable():
            return plain
        one_line = plain.replace("\n", " ")
        return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in one_line)


class OsText(Struct, frozen=True):
    """Text that names files or is run, as the system has it: so many bytes."""

    most: int = 4096

    def pack(self, value: str) -> Plain:
        """As bytes."""
        return value.encode("utf-8", "surrogateescape")

    def unpack(self, plain: Plain) -> str:
        """From bytes, whatever they are."""
        return Bytes(self.most).unpack(plain).decode("utf-8", "surrogateescape")


class Name(Struct, frozen=True):
    """One component of a path."""

    def pack(self, value: bytes) -> Plain:
        """As it is."""
        return value

    def unpack(self, plain: Plain) -> bytes:
        """As it is: 1 to 255 bytes, no slash, no NUL, no dots alone."""
        if type(plain) is not bytes or not valid_name(plain):
            refuse("a name was due")
        return plain


class Path(Struct, frozen=True):
    """Names with slashes between them, below a root; empty: the root itself."""

    most: int = 4096

    def pack(self, value: bytes) -> Plain:
        """As it is."""
        return value

    def unpack(self, plain: Plain) -> bytes:
        """As it is: no way out of the root."""
        if type(plain) is not bytes or len(plain) > self.most:
            refuse(f"a path of up to {self.most} bytes was due")
        if plain and not all(map(valid_name, plain.split(b"/"))):
            refuse("a path below the root was due")
        return plain


class Maybe(Struct, frozen=True):
    """A value, or none."""

    of: Schema

    def pack(self, value: Any) -> Plain:
        """``None`` as it is."""
        return None if value is None else self.of.pack(value)

    def unpack(self, plain: Plain) -> Any:
        """``None`` as it is."""
        return None if plain is None else self.of.unpack(plain)


class Several(Struct, frozen=True):
    """Up to so many values of one kind, in order unless ``into`` has none."""

    of: Schema
    most: int
    into: Callable[[Iterable[Any]], Any] = tuple

    def pack(self, value: Iterable[Any]) -> Plain:
        """As a list; of what has no order, sorted."""
        plain = list(map(self.of.pack, value))
        return sorted(plain) if self.into in (set, frozenset) else plain

    def unpack(self, plain: Plain) -> Any:
        """From a list."""
        if type(plain) is not list or len(plain) > self.most:
            refuse(f"a list of up to {self.most} was due")
        return self.into(map(self.of.unpack, plain))


class Each(Struct, frozen=True):
    """One value of each kind: a tuple."""

    of: tuple[Schema, ...]

    def pack(self, value: tuple[Any, ...]) -> Plain:
        """As a list."""
        return [schema.pack(each) for schema, each in zip(self.of, value, strict=True)]

    def unpack(self, plain: Plain) -> tuple[Any, ...]:
        """From a list of that length."""
        if type(plain) is not list or len(plain) != len(self.of):
            refuse(f"a list of {len(self.of)} was due")
        return tuple(schema.unpack(each) for schema, each in zip(self.of, plain, strict=True))


class Table(Struct, frozen=True):
    """Up to so many values by key, as a list of pairs: each key once."""

    key: Schema
    of: Schema
    most: int

    def pack(self, value: Mapping[Any, Any]) -> Plain:
        """As pairs."""
        return [[self.key.pack(key), self.of.pack(each)] for key, each in value.items()]

    def unpack(self, plain: Plain) -> dict[Any, Any]:
        """From pairs."""
        if type(plain) is not list or len(plain) > self.most:
            refuse(f"up to {self.most} pairs were due")
        found = {}
        for pair in plain:
            if type(pair) is not list or len(pair) != 2:
                refuse("a pair was due")
            found[self.key.unpack(pair[0])] = self.of.unpack(pair[1])
        if len(found) != len(plain):
            refuse("a key stands twice")
        return found


class Member(Struct, frozen=True):
    """One of an enumeration, by its value."""

    of: type[Enum]

    def pack(self, value: Enum) -> Plain:
        """Its value."""
        return value.value

    def unpack(self, plain: Plain) -> Enum:
        """By its value."""
        for member in self.of:
            if type(plain) is type(member.value) and plain == member.value:
                return member
        refuse(f"a {self.of.__name__} was due")


class Record:
    """A class of values: its fields in order, each with its schema."""

    def __init__(self, of: type[Struct], **of_fields: Schema) -> None:
        names = of.__struct_fields__
        if set(names) != set(of_fields):
            raise TypeError(f"{of.__name__}: {set(names) ^ set(of_fields)}")
        self.of = of
        self._fields = [(name, of_fields[name]) for name in names]
        self._schemas = [of_fields[name] for name in names]
        self._by_name = len(of.__match_args__) < len(names)  # some are not told by their place

    def pack(self, value: Any) -> Plain:
        """As a list."""
        return [schema.pack(getattr(value, name)) for name, schema in self._fields]

    def unpack(self, plain: Plain) -> Any:
        """From a list of that length."""
        if type(plain) is not list or len(plain) != len(self._fields):
            refuse(f"a {self.of.__name__} was due")
        values = [schema.unpack(each) for schema, each in zip(self._schemas, plain, strict=True)]
        if self._by_name:
            names = (name for name, _ in self._fields)
            return self.of(**dict(zip(names, values, strict=True)))
        return self.of(*values)


class OneOf:
    """One of several such classes, each under its number."""

    def __init__(self, of: Mapping[int, Record]) -> None:
        self._of = dict(of)
        self._numbers = {record.of: number for number, record in of.items()}
        if len(self._numbers) != len(self._of):
            raise TypeError("a class stands twice")

    def pack(self, value: Any) -> Plain:
        """The number, then the fields."""
        number = self._numbers[type(value)]
        return [number, *self._of[number].pack(value)]

    def unpack(self, plain: Plain) -> Any:
        """By the number."""
        if type(plain) is not list or not plain or type(plain[0]) is not int:
            refuse("a number and fields were due")
        record = self._of.get(plain[0])
        if record is None:
            refuse(f"number {plain[0]} is not known")
        return record.unpack(plain[1:])
