"""Reads the data in a pickle without unpickling it: opcodes are parsed, and nothing is imported, called or built.

Knows the opcodes that plain data and the states of a few named classes are written with, and refuses every other one. A
pickle is a program: this is no sandbox for it but a reader of what it would build if it were only data.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from typing import Any, NoReturn

from .errors import InvalidInput

__all__ = ["MOST_OPCODES", "State", "read_pickle"]

#: More is no record of anybody's memory.
MOST_OPCODES = 20_000_000

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_IGNORED = {"PROTO", "FRAME"}


class State(dict[str, Any]):
    """The attributes of an object of an allowed class, as its pickle gives them. The class itself was never loaded."""


class _Class:
    """The name of an allowed class."""


class _Unread(Exception):
    pass


def read_pickle(data: bytes, *, classes: Collection[str] = ()) -> Any:
    """The dicts, lists, tuples, sets, strings, bytes, numbers, bools and None in a pickle of protocol 0 to 5.

    An object of a class in ``classes`` (``"module.Name"``) comes as a `State` of its attributes. Raises `InvalidInput`
    for damaged data and for anything else: another class, a call, an extension, a persistent id.
    """
    try:
        return _read(data, frozenset(classes))
    except _Unread as error:
        raise InvalidInput(f"the pickle is not read: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InvalidInput(f"the pickle is damaged ({error})") from error


def _read(data: bytes, classes: frozenset[str]) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count > MOST_OPCODES:
            _refuse("it is too large")
        name = opcode.name
        if name in _IGNORED:
            continue
        if name == "STOP":
            if len(stack) != 1:
                _refuse("it ends in the middle of a value")
            return stack[0]
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_class(name, argument, stack, classes))
        else:
            _build(name, stack)
    return _refuse("it has no end")


def _class(name: str, argument: Any, stack: list[Any], classes: frozenset[str]) -> _Class:
    if name == "GLOBAL":
        wanted = ".".join(str(argument).split(" ", 1))
    else:
        qualified, module = stack.pop(), stack.pop()
        wanted = f"{module}.{qualified}"
    if wanted not in classes:
        _refuse(f"it names {wanted[:80]!r}, and only plain data is taken")
    return _Class()


def _build(name: str, stack: list[Any]) -> None:
    """The opcodes that put values together."""
    if name in ("DICT", "LIST", "TUPLE", "FROZENSET"):
        items = _marked(stack)
        if name == "DICT":
            stack.append(dict(zip(_scalars(items[::2]), items[1::2], strict=True)))
        elif name == "FROZENSET":
            stack.append(frozenset(_scalars(items)))
        else:
            stack.append((list if name == "LIST" else tuple)(items))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        size = int(name[-1])
        items = [_plain(stack.pop()) for _ in range(size)]
        stack.append(tuple(reversed(items)))
    elif name in ("APPEND", "APPENDS"):
        items = [_plain(stack.pop())] if name == "APPEND" else _marked(stack)
        _of(stack[-1], list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        if name == "SETITEM":
            value, key = _plain(stack.pop()), _plain(stack.pop())
            items = [key, value]
        else:
            items = _marked(stack)
        _of(stack[-1], dict).update(zip(_scalars(items[::2]), items[1::2], strict=True))
    elif name == "ADDITEMS":
        items = _marked(stack)
        _of(stack[-1], set).update(_scalars(items))
    elif name == "NEWOBJ":
        arguments, cls = stack.pop(), stack.pop()
        if not isinstance(cls, _Class) or arguments != ():
            _refuse("it makes an object from arguments")
        stack.append(State())
    elif name == "BUILD":
        state = stack.pop()
        inner = state.get("__dict__", state) if isinstance(state, dict) else None
        if type(stack[-1]) is not State or not isinstance(inner, dict):
            _refuse("it sets the state of what is no allowed object")
        stack[-1].update(inner)
    else:
        _refuse(f"it has the opcode {name}, which plain data does not need")


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        _refuse(f"a {type(value).__name__} stands where a {kind.__name__} must")
    return value


def _scalars(items: list[Any]) -> list[Any]:
    """Keys and members, where they are plain: hashing nested tuples that share their parts can take for ever."""
    for item in items:
        if not isinstance(item, (str, bytes, int, float, type(None))):
            _refuse(f"a {type(item).__name__} is a key or a member of a set")
    return items


def _marked(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(_plain(item))
    items.reverse()
    return items


def _plain(value: Any) -> Any:
    if value is _MARK or isinstance(value, _Class):
        _refuse("a mark or a class stands where a value must")
    return value


def _refuse(why: str) -> NoReturn:
    raise _Unread(why)
