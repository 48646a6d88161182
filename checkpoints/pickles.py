"""What a pickle of tensors would make, looked at before anything is made: torch's reader may allocate what it says.

torch.load(weights_only=True) runs no code, but a few bytes can still ask it for any amount of memory. So the same
opcodes are read here first, with stand-ins for tensors and memory, and only those that a network's weights need.
"""

from __future__ import annotations

import collections
import io
import mmap
import os
import pickle
import tarfile
import zipfile
from dataclasses import dataclass
from typing import Any

from runtime.plain_files import open_plain

MOST_PICKLE_BYTES = 8 << 20  # the pickle of a network here has some ten thousand; its tensors' bytes lie elsewhere
NUM_OLD_PICKLES = 5  # in a row at the start of a file of before torch 1.6
ITEM_BYTES = {  # {name of a storage class in torch: bytes of a value}
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QUInt8Storage", "QInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
OPCODES = (  # names in pickle; what torch.save writes for tensors in tables, lists and tuples
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
)


class NotPlainError(Exception):
    """A pickle of tensors that are not plain ones, or of other things that torch would read."""


class TooLargeError(Exception):
    """Tensors that claim more than the file holds, or records that are packed."""


@dataclass(frozen=True)
class StandIn:
    """What stands for something that torch would make: a name in torch, a tensor, its memory."""

    what: str


class Reader(pickle._Unpickler):
    """Reads a pickle without making a tensor. storages: {key: (values, bytes)} of the memory that it asks for."""

    stack: list  # these three are the library's
    append: Any
    pop_mark: Any
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in OPCODES}

    def __init__(self, file: Any, more_globals: tuple[str, ...] = ()) -> None:
        super().__init__(file)
        self.storages, self.more_globals = {}, more_globals

    def load(self) -> Any:
        """The value, in stand-ins; UnpicklingError for an opcode that weights do not need."""
        try:
            return super().load()
        except KeyError as error:
            raise pickle.UnpicklingError(f"opcode or key {error}") from None

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what a pickle names; nothing is imported."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if f"{module}.{name}" in self.more_globals:
            return StandIn("other")
        if module.split(".")[0] != "torch":
            raise pickle.UnpicklingError(f"{module}.{name}")
        return StandIn(name)

    def persistent_load(self, pid: Any) -> StandIn:
        """A stand-in for the memory of a tensor: ('storage', class, key, place, number of values, ...)."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], StandIn)):
            raise pickle.UnpicklingError("memory of no known kind")
        kind, key, place, num_values = pid[1].what, *pid[2:5]
        are_texts = isinstance(key, str) and isinstance(place, str)
        if kind not in ITEM_BYTES or type(num_values) is not int or num_values < 0 or not are_texts:
            raise NotPlainError
        memory = num_values, num_values * ITEM_BYTES[kind]
        if self.storages.setdefault(key, memory) != memory or any(part is not None for part in pid[5:]):
            raise NotPlainError
        return StandIn("memory")

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if function is collections.OrderedDict and arguments == ():
            self.stack[-1] = collections.OrderedDict()
        elif not isinstance(function, StandIn) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call of no known kind")
        elif function.what == "_rebuild_from_type_v2" and self.more_globals and is_with_attributes(arguments):
            self.stack[-1] = StandIn("tensor")
        elif function.what == "_rebuild_tensor_v2" and len(arguments) >= 4 and is_sizes(arguments[2], arguments[3]):
            if arguments[0] != StandIn("memory"):
                raise NotPlainError
            self.stack[-1] = StandIn("tensor")
        elif function.what == "_rebuild_parameter" and arguments and arguments[0] == StandIn("tensor"):
            self.stack[-1] = StandIn("tensor")
        elif function.what == "Size" and len(arguments) == 1 and is_sizes(arguments[0]):
            self.stack[-1] = arguments[0]
        elif function.what == "device" or (function.what == "other" and self.more_globals):
            self.stack[-1] = StandIn("value")
        else:
            raise NotPlainError

    def load_build(self) -> None:
        """Attributes of a table, as torch's _metadata, or of one of `more_globals`."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (collections.OrderedDict, StandIn)):
            raise pickle.UnpicklingError("attributes of no known kind")

    def load_newobj(self) -> None:
        """An object of one of `more_globals`."""
        self.stack.pop()
        if self.stack.pop() != StandIn("other"):
            raise pickle.UnpicklingError("an object of no known kind")
        self.append(StandIn("value"))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        set_items(self.stack[-1], items)

    for code, function in (
        (pickle.REDUCE, load_reduce),
        (pickle.BUILD, load_build),
        (pickle.NEWOBJ, load_newobj),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
    ):
        dispatch[code[0]] = function  # type: ignore[assignment]
    del code, function


def set_items(table: dict, items: Any) -> None:
    """Put keys and values, one after the other, into a table; its keys are texts and numbers, quick to compare."""
    if not isinstance(table, dict) or len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):
        raise NotPlainError
    table.update(zip(items[::2], items[1::2]))


def is_with_attributes(arguments: Any) -> Any:
    """Are these of a plain tensor with attributes of its own, as DeepSpeed writes the parts of ZeRO-3?"""
    if len(arguments) != 4 or arguments[:2] != (StandIn("_rebuild_tensor_v2"), StandIn("Tensor")):
        return False
    parts = arguments[2]
    is_tensor = isinstance(parts, tuple) and len(parts) >= 4 and parts[0] == StandIn("memory")
    return is_tensor and is_sizes(parts[2], parts[3]) and isinstance(arguments[3], dict)


def is_sizes(*values: Any) -> bool:
    """Are these tuples of whole numbers that a tensor can have?"""
    return all(
        isinstance(value, tuple) and all(type(n) is int and 0 <= n < 1 << 48 for n in value) and len(value) < 64
        for value in values
    )


class Bounded(io.RawIOBase):
    """A pickle in a mapped file: no opcode may be longer than a pickle of weights is."""

    def __init__(self, content: Any) -> None:
        self.content, self.at = content, 0

    def read(self, size: Any = -1) -> bytes:
        if not 0 <= size <= MOST_PICKLE_BYTES:
            raise pickle.UnpicklingError("an opcode that is too long")
        self.at += size
        if self.at > MOST_PICKLE_BYTES:
            raise pickle.UnpicklingError("too long")
        return self.content[self.at - size : self.at]

    def readline(self, size: Any = -1) -> bytes:
        end = self.content.find(b"\n", self.at, self.at + 1000) + 1
        return self.read(end - self.at if end else 0)


def check_pickle(path: str, more_globals: tuple[str, ...] = ()) -> None:
    """Look at a file that torch.load is to read. UnpicklingError, NotPlainError, TooLargeError, or what broken bytes
    raise.

    more_globals: `module.name` of what may be in it besides tensors, tables, lists, tuples, texts and numbers.
    """
    size = os.path.getsize(path)
    if not zipfile.is_zipfile(path):
        check_old(path, size, more_globals)
        return
    with open_plain(path) as file, zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        names = [name for name in records if name.endswith("/data.pkl")]
        file.seek(0)
        if len(names) != 1 or len(records) < len(archive.infolist()) or archive.comment or file.read(2) != b"PK":
            raise pickle.UnpicklingError("not an archive that torch writes")
        is_packed = any(r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1 for r in records.values())
        if is_packed or sum(record.file_size for record in records.values()) > size:
            raise TooLargeError
        if records[names[0]].file_size > MOST_PICKLE_BYTES:
            raise pickle.UnpicklingError("too long")
        reader = Reader(io.BytesIO(stored_bytes(file, records[names[0]])), more_globals)
        reader.load()
        folder = names[0].removesuffix("data.pkl")
        for key, (_, num_bytes) in reader.storages.items():
            record = records.get(f"{folder}data/{key}")
            if record is None or num_bytes > record.file_size:
                raise TooLargeError


def stored_bytes(file: Any, record: Any) -> Any:
    """The bytes of a record that is not packed. zipfile would compare a checksum, and states have none."""
    file.seek(record.header_offset)
    head = file.read(30)
    file.seek(record.header_offset + 30 + sum(int.from_bytes(head[at : at + 2], "little") for at in (26, 28)))
    return file.read(record.file_size)


def check_old(path: str, size: Any, more_globals: tuple[str, ...]) -> None:
    """`check_pickle` for a file of before torch 1.6: pickles one after another, then the bytes of tensors."""
    with open_plain(path) as file:
        if not size or file.read(2) == b"PK":
            raise EOFError("nothing, or an archive without its end")
        if is_tar(file):
            raise pickle.UnpicklingError("not a file that torch writes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            bounded, storages = Bounded(content), {}
            for number in range(NUM_OLD_PICKLES):
                reader = Reader(bounded, more_globals)
                keys = reader.load()  # of the last one: the order of the tensors' bytes
                if number < 2 and type(keys) is not int:  # what marks the format, and its version
                    raise pickle.UnpicklingError("not a file that torch writes")
                storages |= reader.storages
            if not isinstance(keys, list) or {type(key) for key in keys} - {str} or sorted(keys) != sorted(storages):
                raise TooLargeError
            at = bounded.at
            for num_values, num_bytes in map(storages.get, keys):  # their number, then their bytes
                if int.from_bytes(content[at : at + 8], "little") != num_values:
                    raise TooLargeError
                at += 8 + num_bytes
            if at > size:
                raise TooLargeError


def is_tar(file: Any) -> bool:
    """Is it an archive of tar, which torch would take, too?"""
    try:
        file.seek(0)
        tarfile.open(fileobj=file, mode="r:").close()
        return True
    except (tarfile.TarError, ValueError, ArithmeticError):
        return False
