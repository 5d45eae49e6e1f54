"""`dataclass` of the standard library, without the source code that it writes and compiles for each class.

That code took a third of what a supervisor needs to begin its work, and so of every start, upgrade and recovery. Here
all classes share a few plain functions; the fields, `fields`, `replace`, `asdict` and `is_dataclass` are those of the
standard library. Pure.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(
        *, frozen: bool = False, slots: bool = True, eq: bool = True, kw_only: bool = False
    ) -> Callable[[type], type]:
        """As `dataclasses.dataclass` with these arguments; there are no classes without slots. Methods that the class
        has itself stay. Wrong arguments raise TypeError, a change of a frozen one FrozenInstanceError."""
        if not slots:
            raise TypeError("a record has slots")

        def made(cls: type) -> type:
            cls.__doc__ = cls.__doc__ or cls.__name__  # else its signature is looked up, to stand there
            own = set(cls.__dict__)
            cls = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True, kw_only=kw_only)(cls)
            listed = dataclasses.fields(cls)
            methods = {"__init__": _init(cls), "__repr__": _repr(listed)}
            if eq:
                methods |= _comparison(listed, frozen=frozen)
            if frozen:
                methods |= {"__setattr__": _frozen, "__delattr__": _frozen, "__setstate__": _set_state}
            for name, method in methods.items():
                if name not in own:
                    setattr(cls, name, method)
            return cls

        return made


def _init(cls: type) -> Callable[..., None]:
    """Fields that are given by position come first, then those that must be named."""
    listed = [each for each in dataclasses.fields(cls) if not each.kw_only]
    most = len(listed)
    listed += [each for each in dataclasses.fields(cls) if each.kw_only]
    puts = [getattr(cls, each.name).__set__ for each in listed]
    table = [
        (each.name, put, each.default, each.default_factory) for each, put in zip(listed, puts, strict=True)
    ]
    missing = dataclasses.MISSING

    def init(self: object, *args: object, **named: object) -> None:
        count = len(args)
        if count > most:
            raise TypeError(f"{cls.__name__}() takes {most} values, {count} were given")
        for put, value in zip(puts, args, strict=False):
            put(self, value)
        for name, put, default, factory in table[count:] if count else table:
            if name in named:
                put(self, named.pop(name))
            elif default is not missing:
                put(self, default)
            elif factory is not missing:
                put(self, factory())
            else:
                raise TypeError(f"{cls.__name__}() needs a value for {name!r}")
        if named:
            name = next(iter(named))
            what = "has two values" if any(name == each.name for each in listed) else "is none of its fields"
            raise TypeError(f"{cls.__name__}(): {name!r} {what}")

    return init


def _repr(listed: tuple[dataclasses.Field[Any], ...]) -> Callable[[object], str]:
    names = [each.name for each in listed if each.repr]

    def shown(self: object) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    return shown


def _comparison(listed: tuple[dataclasses.Field[Any], ...], *, frozen: bool) -> dict[str, Any]:
    names = [each.name for each in listed if each.compare]
    values: Callable[[object], object] = operator.attrgetter(*names) if names else lambda record: ()

    def equal(self: object, other: object) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def hashed(self: object) -> int:
        return hash(values(self))

    return {"__eq__": equal, "__hash__": hashed if frozen else None}


def _frozen(self: object, name: str, *value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name} can't be changed")


def _set_state(self: object, state: tuple[object, dict[str, object]]) -> None:
    """For copies: what `object.__getstate__` has told."""
    for name, value in state[1].items():
        object.__setattr__(self, name, value)
