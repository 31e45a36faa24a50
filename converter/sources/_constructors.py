"""What a pickle may call: our own harmless versions of the constructors that torch, numpy and pickle write.

`CONSTRUCTORS` is the whole list. Each takes the argument tuple and the budget, checks every argument, and builds plain
Python data or numpy arrays. `refuse_dangerous` names what a pickle must not even mention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from gkp.converter.budget import Budget
from gkp.errors import UnsafeFileError
from gkp.text import clean
from gkp.types import Array

from ._records import Global, ObjectArray, Record, Storage, corrupt
from ._records import key as hashable

_ELEMENT = 64  # bytes that a copy takes per element, also in a dict or set

Constructor = Callable[[tuple[Any, ...], Budget], Any]

UNSAFE_HINT = "If you trust its author, load it with its own code, export the network to ONNX, and convert that."

_BUILTINS = ("builtins", "__builtin__")
# Modules through which a pickle can run code or reach the machine.
_DANGEROUS_MODULES = """
    os posix nt subprocess sys importlib imp runpy shutil socket pty code codeop ctypes cffi pickle _pickle cPickle dill
    cloudpickle joblib marshal operator _operator functools _functools itertools webbrowser platform tempfile glob io
    _io http urllib requests ssl ftplib smtplib telnetlib xmlrpc multiprocessing concurrent asyncio threading _thread
    signal site sysconfig pkgutil zipimport inspect types gc timeit trace pdb bdb cProfile profile doctest unittest pip
    setuptools distutils ensurepip venv commands popen2 shelve dbm sqlite3 mmap fcntl resource pathlib linecache atexit
    weakref antigravity idlelib test ast dis codecs _codecs copyreg copy_reg
"""
_DANGEROUS_PREFIXES = """
    numpy.load numpy.save numpy.fromfile numpy.memmap numpy.f2py numpy.distutils numpy.testing numpy.lib numpy.ctypeslib
    torch.load torch.save torch.hub torch.jit torch.serialization torch.package torch.utils.cpp_extension
    torch.utils.model_zoo torch.utils.data torch._dynamo torch._inductor torch.compile torch.distributed
    torch.multiprocessing torch.storage._load_from_bytes torch.fx torch.ops torch.classes torch.library torch.testing
    torch.from_file torch.export torch.onnx torch.os torch.sys
"""
_DANGEROUS = frozenset((_DANGEROUS_MODULES + _DANGEROUS_PREFIXES).split())


def refuse_dangerous(name: str) -> None:
    """UnsafeFileError if the global `name`, or a module it lies in, can run code or touch files."""
    parts = name.split(".", 4)[:4]
    prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
    builtin = parts[0] in _BUILTINS and name.partition(".")[2] != "object"
    if name not in CONSTRUCTORS and (builtin or prefixes & _DANGEROUS):
        raise UnsafeFileError(f"pickle refers to {clean(name, 120)}", UNSAFE_HINT)


# --- plain Python -----------------------------------------------------------------------------------------------------


def _one(args: tuple[Any, ...], kinds: tuple[type, ...], default: Any) -> Any:
    if not args:
        return default
    if len(args) != 1 or not isinstance(args[0], kinds):
        raise corrupt("a constructor got arguments it cannot take")
    return args[0]


def _elements(args: tuple[Any, ...], budget: Budget) -> Iterable[Any]:
    values = _one(args, (list, tuple, set, frozenset, dict), ())
    _copied(len(values), budget)
    return values  # type: ignore[no-any-return]


def _copied(count: int, budget: Budget) -> None:
    budget.elements(count)
    budget.bytes(_ELEMENT * count)


def _list(args: tuple[Any, ...], budget: Budget) -> list[Any]:
    return list(_elements(args, budget))


def _tuple(args: tuple[Any, ...], budget: Budget) -> tuple[Any, ...]:
    return tuple(_elements(args, budget))


def _set(args: tuple[Any, ...], budget: Budget) -> set[Any]:
    return {hashable(value, budget) for value in _elements(args, budget)}


def _frozenset(args: tuple[Any, ...], budget: Budget) -> frozenset[Any]:
    return frozenset(_set(args, budget))


def _dict(args: tuple[Any, ...], budget: Budget) -> dict[Any, Any]:
    source = _one(args, (dict, list, tuple), ())
    _copied(len(source), budget)
    if isinstance(source, dict):
        return dict(source)
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in source):
        raise corrupt("a dict is made from something other than pairs")
    return {hashable(key, budget): value for key, value in source}


def _defaultdict(args: tuple[Any, ...], budget: Budget) -> dict[Any, Any]:
    return _dict(args[1:], budget)


def _number(kind: type) -> Constructor:
    def build(args: tuple[Any, ...], budget: Budget) -> Any:
        value = _one(args, (bool, int, float), 0)
        return kind(value)

    return build


def _complex(args: tuple[Any, ...], budget: Budget) -> complex:
    if len(args) > 2 or not all(isinstance(part, (int, float)) for part in args):
        raise corrupt("complex() got arguments it cannot take")
    return complex(*args)


def _str(args: tuple[Any, ...], budget: Budget) -> str:
    return str(_one(args, (str,), ""))


def _bytes(args: tuple[Any, ...], budget: Budget) -> bytes:
    """bytes(), bytes(b"..") or bytearray("text", "latin-1"); never bytes(count)."""
    if len(args) == 2:
        return _encode(args, budget)
    value = _one(args, (bytes, bytearray), b"")
    budget.bytes(len(value))
    return bytes(value)


def _bytearray(args: tuple[Any, ...], budget: Budget) -> bytearray:
    return bytearray(_bytes(args, budget))


def _encode(args: tuple[Any, ...], budget: Budget) -> bytes:
    """_codecs.encode(text, "latin1"): how protocol 2 spells bytes."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        raise corrupt("_codecs.encode got arguments it cannot take")
    budget.bytes(len(args[0]))
    return args[0].encode("latin-1")


def _integers(kind: Callable[..., Any]) -> Constructor:
    def build(args: tuple[Any, ...], budget: Budget) -> Any:
        if not 1 <= len(args) <= 3 or not all(part is None or isinstance(part, int) for part in args):
            raise corrupt(f"{kind.__name__} got arguments it cannot take")
        return kind(*args)

    return build


def _reconstructor(args: tuple[Any, ...], budget: Budget) -> Record:
    """copyreg._reconstructor(cls, base, state): how protocols 0 and 1 spell an instance."""
    if len(args) != 3 or not isinstance(args[0], Global):
        raise corrupt("copyreg._reconstructor got arguments it cannot take")
    budget.objects(4)
    return Record(args[0].name, () if args[2] is None else (args[2],))


# --- torch ------------------------------------------------------------------------------------------------------------


def _tensor(args: tuple[Any, ...], budget: Budget) -> Array:
    """torch._utils._rebuild_tensor(_v2)(storage, offset, size, stride, ...)."""
    if len(args) < 4 or not isinstance(args[0], Storage):
        raise corrupt("a tensor has no storage")
    storage: Storage = args[0]
    offset, size, stride = args[1:4]
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise corrupt("a tensor has no shape")
    return storage.tensor(offset, size, stride, budget)


def _parameter(args: tuple[Any, ...], budget: Budget) -> Array:
    if not args or not isinstance(args[0], np.ndarray):
        raise corrupt("a parameter has no tensor")
    tensor: Array = args[0]
    return tensor


def _tensor_with_attributes(args: tuple[Any, ...], budget: Budget) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state): the attributes are dropped."""
    if len(args) != 4 or not isinstance(args[0], Global) or not isinstance(args[2], tuple):
        raise corrupt("_rebuild_from_type_v2 got arguments it cannot take")
    function = _TENSORS.get(args[0].name)
    if function is None:
        raise UnsafeFileError(f"pickle calls {clean(args[0].name, 120)}", UNSAFE_HINT)
    return function(args[2], budget)


def _device(args: tuple[Any, ...], budget: Budget) -> str:
    if not 1 <= len(args) <= 2 or not isinstance(args[0], str) or not all(isinstance(i, int) for i in args[1:]):
        raise corrupt("torch.device got arguments it cannot take")
    return ":".join(str(part) for part in args)


def _layout(args: tuple[Any, ...], budget: Budget) -> Global:
    return Global(_str(args, budget))


def _thnn_backend(args: tuple[Any, ...], budget: Budget) -> Record:
    """torch.nn.backends.thnn._get_thnn_function_backend(): what modules held as `_backend` before PyTorch 1.3."""
    if args:
        raise corrupt("_get_thnn_function_backend got arguments it cannot take")
    budget.objects(4)
    return Record("torch.nn.backends.thnn.THNNFunctionBackend")


def _type_tag(args: tuple[Any, ...], budget: Budget) -> Any:
    """torch.jit._pickle.restore_type_tag(value, "Dict[str, int]")."""
    if len(args) != 2 or not isinstance(args[1], str):
        raise corrupt("restore_type_tag got arguments it cannot take")
    return args[0]


# --- numpy ------------------------------------------------------------------------------------------------------------

_PLAIN_DTYPE = re.compile(r"[<>=|]?(?:[?]|b1|[iu][1248]?|f[248]?|c(?:8|16)|[SUa]\d{1,9}|O8?|O4)")


class NumpyDtype:
    """A numpy.dtype under construction; pickles give the byte order in a second step."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def set_state(self, state: Any) -> None:
        """State (version, byte order, subdtype, names, fields, ...); only the byte order may say something."""
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise corrupt("a numpy dtype has an impossible state")
        if any(part is not None for part in state[2:5]):
            raise corrupt("numpy arrays with fields cannot be read")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)  # type: ignore[arg-type]


def plain_dtype(code: Any) -> np.dtype[Any]:
    """The dtype of a numpy type string: bool, integers, floats, complex, fixed text, object. FileError for others."""
    if isinstance(code, str) and _PLAIN_DTYPE.fullmatch(code):
        return np.dtype(code)
    raise corrupt("an array has a type that cannot be read")


def plain_array(data: Any, dtype: np.dtype[Any], shape: Any, fortran: Any, budget: Budget) -> Array:
    """A native C-contiguous copy of `data` (bytes, or latin-1 text from Python 2). FileError if the sizes disagree."""
    if isinstance(data, str):
        budget.bytes(len(data))
        data = data.encode("latin-1")
    if not isinstance(data, (bytes, bytearray)) or dtype.hasobject or dtype.itemsize > len(data) + 64:
        raise corrupt("an array holds no numbers")
    if _element_count(shape) * dtype.itemsize != len(data):
        raise corrupt(f"an array holds {len(data)} bytes, which its shape contradicts")
    budget.bytes(len(data))
    flat: Array = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    if dtype.kind == "b":
        flat = flat.view(np.uint8) != 0  # any byte but 0 is True
    native: Array = flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), order="C")
    return native


def _element_count(shape: Any) -> int:
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(isinstance(n, int) and 0 <= n < 2**62 for n in shape):
        raise corrupt("an array has an impossible shape")
    return math.prod(shape)


class UnfilledArray:
    """What numpy's _reconstruct gives: BUILD brings the content. places: where the memo refers to it."""

    __slots__ = ("places",)

    def __init__(self) -> None:
        self.places: list[int] = []


def array_of_state(state: Any, budget: Budget) -> Array | ObjectArray:
    """ndarray.__setstate__; state (version, shape, dtype, fortran, data)."""
    if not isinstance(state, tuple) or len(state) not in (4, 5) or not isinstance(state[-3], NumpyDtype):
        raise corrupt("a numpy array has an impossible state")
    shape, dtype, fortran, data = state[-4], state[-3].dtype, state[-2], state[-1]
    if not dtype.hasobject:
        return plain_array(data, dtype, shape, fortran, budget)
    if not isinstance(data, list) or len(data) != _element_count(shape) :
        raise corrupt("an object array holds the wrong number of elements")
    budget.bytes(8 * len(data))
    return ObjectArray(shape, list(data))  # in C order, whatever its memory was


def _reconstruct(args: tuple[Any, ...], budget: Budget) -> UnfilledArray:
    """numpy.core.multiarray._reconstruct(numpy.ndarray, (0,), b"b"): an empty array, filled by its state."""
    if len(args) != 3 or not isinstance(args[0], Global) or args[0].name != "numpy.ndarray":
        raise corrupt("numpy's _reconstruct got arguments it cannot take")
    return UnfilledArray()


def _dtype(args: tuple[Any, ...], budget: Budget) -> NumpyDtype:
    return NumpyDtype(plain_dtype(args[0] if args else None))


def _scalar(args: tuple[Any, ...], budget: Budget) -> Any:
    """numpy.core.multiarray.scalar(dtype, bytes)."""
    if len(args) != 2 or not isinstance(args[0], NumpyDtype):
        raise corrupt("a numpy scalar has no type")
    return plain_array(args[1], args[0].dtype, (1,), False, budget)[0]


def _frombuffer(args: tuple[Any, ...], budget: Budget) -> Array:
    """numpy.core.numeric._frombuffer(buffer, dtype, shape, order): arrays in protocol 5."""
    if len(args) != 4 or not isinstance(args[1], NumpyDtype) or args[3] not in ("C", "F"):
        raise corrupt("numpy's _frombuffer got arguments it cannot take")
    return plain_array(args[0], args[1].dtype, args[2], args[3] == "F", budget)


# --- the table --------------------------------------------------------------------------------------------------------

_TENSORS: dict[str, Constructor] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

_PYTHON: dict[str, Constructor] = {
    "set": _set,
    "frozenset": _frozenset,
    "list": _list,
    "dict": _dict,
    "tuple": _tuple,
    "int": _number(int),
    "long": _number(int),
    "float": _number(float),
    "bool": _number(bool),
    "str": _str,
    "unicode": _str,
    "complex": _complex,
    "bytes": _bytes,
    "bytearray": _bytearray,
    "slice": _integers(slice),
    "range": _integers(range),
    "xrange": _integers(range),
}

CONSTRUCTORS: dict[str, Constructor] = {
    **_TENSORS,
    **{f"{module}.{name}": function for module in _BUILTINS for name, function in _PYTHON.items()},
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Size": _tuple,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "torch.nn.backends.thnn._get_thnn_function_backend": _thnn_backend,
    **{f"torch.jit._pickle.build_{kind}list": _list for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": _type_tag,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
}
