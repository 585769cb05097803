"""Files of `torch.save` that hold more than tensors and plain types, read without importing or calling any of it.

`torch.load(..., weights_only=True)` refuses a file as a whole for one NumPy scalar, `datetime` or OmegaConf dictionary
beside the weights. Here only dense tensors are built. Any other object becomes a `Skipped`, which keeps the items of a
mapping and nothing else. A file that calls a function is refused: what data is pickled by calls of is listed below.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch

# What plain data of the standard library, NumPy and torch is pickled as a call of: modules, and single names.
_DATA_MODULES = frozenset(
    (
        *("collections", "datetime", "decimal", "enum", "fractions", "pathlib", "typing", "uuid", "zoneinfo"),
        *("numpy.random._pickle", "numpy.random.bit_generator"),
    )
)
_DATA_NAMES = frozenset(
    (
        *("argparse.Namespace", "types.SimpleNamespace", "functools.partial", "operator.getitem"),
        *("_codecs.encode", "copyreg._reconstructor", "torch.device", "torch.Size"),
        *("torch.serialization._get_layout", "numpy.dtype", "numpy.ndarray"),
        *(f"{core}.multiarray.{name}" for core in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")),
        *(f"{core}.numeric._frombuffer" for core in ("numpy.core", "numpy._core")),
        *(
            f"builtins.{name}"
            for name in (
                *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object"),
                *("range", "set", "slice", "str", "tuple"),
            )
        ),
    )
)
_DATA_PREFIXES = ("torch._utils._rebuild_",)  # sparse, quantised and other tensors

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class CodeError(Exception):
    """A file calls a function or class that no plain data is pickled with; its name is the argument."""


class _Global(type):
    """A function or class that a file names. A pickle's calls come here; `cls.__new__`, of plain objects, does not."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.build is not None:
            return cls.build(*args)
        if not _is_data(cls.full_name):
            raise CodeError(cls.full_name)
        return cls.__new__(cls)


class Skipped(dict, metaclass=_Global):
    """An object of a class that was not imported: it keeps the items of a mapping, and no other state.

    Attributes:
        full_name: module and name of its class.
    """

    full_name = ""
    build: Callable[..., Any] | None = None
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __new__(cls, *args: Any, **kwargs: Any) -> Skipped:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def _ignore(self, item: Any) -> None:
        pass

    append = extend = add = _ignore  # items of subclasses of list and set


def load_weights(path: str | os.PathLike[str]) -> Any:
    """What a file of `torch.save` holds, with dense tensors on the CPU and `Skipped` for objects of other classes.

    Args:
        path: a zip archive, or the format of versions before 1.6.

    Raises:
        CodeError: the file calls a function or class that is not one of plain data.
        Exception: nearly anything else, on damaged input.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                return _load_zip(archive)
        file.seek(0)
        return _load_legacy(file)


def _load_zip(archive: zipfile.ZipFile) -> Any:
    (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder = main.removesuffix("data.pkl")
    if folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder").decode() != sys.byteorder:
        raise ValueError("the file was written on a machine of another byte order")
    storages: dict[str, torch.UntypedStorage] = {}

    def storage_of(key: str, num_bytes: int) -> torch.UntypedStorage:
        if key not in storages:
            content = archive.read(f"{folder}data/{key}")
            if len(content) != num_bytes:
                raise ValueError(f"storage {key} has {len(content)} bytes, not {num_bytes}")
            storages[key] = _storage_from(content)
        return storages[key]

    with archive.open(main) as pickled:
        return _Unpickler(pickled, storage_of).load()


def _load_legacy(file: IO[bytes]) -> Any:
    size = os.fstat(file.fileno()).st_size
    storages: dict[str, tuple[torch.UntypedStorage, int]] = {}

    def storage_of(key: str, num_bytes: int) -> torch.UntypedStorage:
        if not 0 <= num_bytes <= size:
            raise ValueError(f"storage {key} is larger than the file")
        if key not in storages:  # its content follows the pickle
            storages[key] = torch.UntypedStorage(num_bytes)
        return storages[key]

    if _Unpickler(file, storage_of).load() != _LEGACY_MAGIC:
        raise ValueError("not a file of torch.save")
    _version, system = (_Unpickler(file, storage_of).load() for _ in range(2))
    if system["little_endian"] != (sys.byteorder == "little"):
        raise ValueError("the file was written on a machine of another byte order")
    content = _Unpickler(file, storage_of).load()
    for key in _Unpickler(file, storage_of).load():
        file.read(8)  # number of elements
        read = file.read(storages[key].nbytes())
        storages[key].copy_(_storage_from(read))
    return content


def _storage_from(content: bytes) -> torch.UntypedStorage:
    if not content:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()


class _Unpickler(pickle.Unpickler):
    """Builds dense tensors, and `Skipped` for all other objects; nothing is imported."""

    def __init__(self, file: IO[bytes], storage_of: Callable[[str, int], torch.UntypedStorage]) -> None:
        super().__init__(file)
        self._storage_of = storage_of
        self._globals: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The `Skipped` class of that name, or a dtype."""
        # Protocol 2, torch's own, writes the names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f"{module}.{name}"
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if full_name not in self._globals:
            build = _BUILDERS.get(full_name)
            attributes = {"full_name": full_name, "build": None if build is None else staticmethod(build)}
            self._globals[full_name] = _Global(name, (Skipped,), attributes)
        return self._globals[full_name]

    def persistent_load(self, pid: Any) -> Any:
        """A storage, with the dtype of its elements; or the class of a network."""
        kind, *rest = pid
        if kind == "module":  # older versions wrap the class of a network
            return rest[0]
        storage_type, key, _device, length, *view = rest
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError(f"unknown persistent object {kind}")
        dtype = _STORAGE_DTYPES[storage_type.full_name.rpartition(".")[2]]
        return self._storage_of(key, length * dtype.itemsize), dtype


def _rebuild_tensor(
    storage: tuple[torch.UntypedStorage, torch.dtype], offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> torch.Tensor:
    """Tensor over a storage, which has to hold it: `Tensor.set_` would enlarge it."""
    content, dtype = storage
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if 0 not in size else -1
    if min((offset, *size, *stride)) < 0 or (offset + last + 1) * dtype.itemsize > content.nbytes():
        raise ValueError(f"a tensor of shape {tuple(size)} is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(content, offset, tuple(size), tuple(stride))


def _rebuild_tensor_of_dtype(
    storage: tuple[torch.UntypedStorage, torch.dtype],
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    _requires_grad: bool,
    _hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> torch.Tensor:
    return _rebuild_tensor((storage[0], dtype), offset, size, stride)


def _rebuild_parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


def _rebuild_subclass(rebuild: _Global, _type: Any, args: Sequence[Any], _state: Any) -> Any:
    return rebuild(*args)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
}


def _is_data(full_name: str) -> bool:
    """Whether a call of that name in a pickle builds plain data: a listed one, or a class of another library."""
    module, _, name = full_name.rpartition(".")
    root = module.partition(".")[0]
    if full_name in _DATA_NAMES or module in _DATA_MODULES or root in _DATA_MODULES:
        return True
    # Enumerations and the like, by the naming convention of classes; they are not called, only skipped.
    return full_name.startswith(_DATA_PREFIXES) or (
        root not in sys.stdlib_module_names and name.lstrip("_")[:1].isupper()
    )
