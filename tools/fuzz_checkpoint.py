"""What checkpoints hold, as pickles: calls of every constructor that is known, instances, arrays, tensors, modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

from fuzz_pickle import NUMBERS, TEXTS, Thing, Writer

CLASSES = ("torch.nn.modules.container.Sequential", "torch.nn.modules.conv.Conv2d", "torch.nn.modules.batchnorm.BatchNorm2d",
           "torch.nn.parallel.data_parallel.DataParallel", "argparse.Namespace", "__main__.Net", "a.b.c", "numpy.ndarray",
           "torch.Tensor", "torch.nn.parameter.Parameter", "builtins.object", "models.resnet.ResNet")
_SEQUENCE, _PAIRS, _NUMBER = ("sequence?",), ("pairs?",), ("number?",)
_BLOB = ("blob?",)
_PYTHON = {"set": ("hashables?",), "frozenset": ("hashables?",), "list": _SEQUENCE, "dict": _PAIRS, "tuple": _SEQUENCE,
           "int": _NUMBER, "long": _NUMBER, "float": _NUMBER, "bool": _NUMBER, "str": ("str?",), "unicode": ("str?",),
           "complex": ("number?", "number?"), "bytes": _BLOB, "bytearray": _BLOB, "slice": ("bound", "bound?", "bound?"),
           "range": ("int", "int?", "int?"), "xrange": ("int", "int?", "int?")}
_LISTS = {f"torch.jit._pickle.build_{kind}list": ("sequence",) for kind in ("int", "double", "bool", "tensor")}
SIGNATURES: dict[str, tuple[str, ...]] = {
    **{f"{module}.{name}": kinds for module in ("builtins", "__builtin__") for name, kinds in _PYTHON.items()},
    "collections.OrderedDict": _PAIRS, "collections.Counter": _PAIRS, "collections.defaultdict": ("global", "pairs?"),
    "_codecs.encode": ("latin", "latin1"), "copyreg._reconstructor": ("global", "global", "any"),
    "copy_reg._reconstructor": ("global", "global", "any"), "torch.Size": ("shape",), "torch.device": ("str", "int?"),
    "torch.serialization._get_layout": ("str",), **_LISTS, "torch.jit._pickle.restore_type_tag": ("any", "str"),
    "torch._utils._rebuild_parameter": ("array", "bool", "dict"),
    "torch._utils._rebuild_parameter_with_state": ("array", "bool", "dict", "any"),
    "torch._utils._rebuild_tensor": ("storage", "int", "shape", "shape"),
    "torch._utils._rebuild_tensor_v2": ("storage", "int", "shape", "shape", "bool", "dict"),
    "torch._tensor._rebuild_from_type_v2": ("function", "global", "view", "any"),
    "numpy.dtype": ("code", "bool", "bool")}
for _core in ("core", "_core"):
    SIGNATURES |= {f"numpy.{_core}.multiarray._reconstruct": ("ndarray", "empty", "letter"),
                   f"numpy.{_core}.multiarray.scalar": ("dtype", "bytes"),
                   f"numpy.{_core}.numeric._frombuffer": ("bytes", "dtype", "shape", "order")}
RESULTS = {**dict.fromkeys(("dict", "OrderedDict", "Counter", "defaultdict"), "dict"), "list": "list", "set": "set",
           "frozenset": "frozenset", "tuple": "tuple", "Size": "tuple", "bytearray": "bytearray"}
DTYPES = {"f4": 4, "f8": 8, "i8": 8, "b1": 1, "u1": 1, "c8": 8, "S5": 5, "U3": 12, "f2": 2, "i4": 4}
_ODD_DTYPES = ("M8[ns]", "V4", "i3", "f16", "S999999999", "O8", "", "(2,)f4", "<f4", "|b1", "a3", "U0", "S0", "c16", "f4,i4")
STORAGE_BYTES = {"FloatStorage": 4, "DoubleStorage": 8, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
                 "BoolStorage": 1, "ByteStorage": 1, "ComplexFloatStorage": 8, "UntypedStorage": 1}


@dataclass
class Checkpoint(Writer):
    """outside: are there storages outside the pickle? They are noted in `storages`: {key: (class, numbers)}."""

    FLAT: ClassVar[tuple[str, ...]] = (*Writer.FLAT, "big")
    DEEP: ClassVar[tuple[str, ...]] = (*Writer.DEEP, "call", "record", "array", "tensor", "objects", "module")
    NAMES: ClassVar[tuple[str, ...]] = (*CLASSES * 4, *SIGNATURES)
    outside: bool = False
    tidy: bool = False  # arrays are written as everybody does
    storages: dict[str, tuple[str, int]] = field(default_factory=dict)

    def _call(self, depth: int) -> None:
        self.call(self.rng.choice(tuple(SIGNATURES)), depth)

    def call(self, name: str, depth: int, *given: Callable[[], None]) -> None:
        """Call it in one of the ways. given: push the arguments; without them, by its signature."""
        rng, kinds = self.rng, list(SIGNATURES.get(name, ()))
        while kinds and kinds[-1].endswith("?") and rng.random() < 0.3:
            kinds.pop()
        pushes = given or [lambda kind=kind: self.value(kind.rstrip("?"), depth) for kind in kinds]
        way = rng.choice("RRRR\x81\x92oi") if pushes else rng.choice("R\x81")
        if way in "oi":
            self.mark()
        if way != "i":
            self.name(name)
        if way not in "oi":
            self.mark()
        for push in pushes:
            push()
        result = RESULTS.get(name.rpartition(".")[2], "called")
        if way in "oi":
            module, _, attribute = name.rpartition(".")
            self.collect(b"o" if way == "o" else f"i{module}\n{attribute}\n".encode(), result)
            return
        self.collect(b"t", "tuple")
        if way == "\x92":
            self.op(b"}", 0, "dict")
        self.op(way.encode("latin-1"), 3 if way == "\x92" else 2, result)

    def _sequence(self, depth: int) -> None:
        self.value(self.rng.choice(("list", "tuple", "set", "frozenset", "dict")), depth)

    def _hashables(self, depth: int) -> None:
        self.members(self.rng.choice((b"l", b"t", b"\x91")), "list")

    def _pairs(self, depth: int) -> None:
        if self.rng.random() < 0.6:
            self.value("dict", depth)
            return
        self.mark()
        for _ in range(self.rng.randrange(4)):
            self.value("key", 0)
            self.value("any", depth)
            self.op(b"\x86", 2, "tuple")
        self.collect(b"l", "list")

    def _number(self, depth: int) -> None:
        self.value(self.rng.choice(("int", "float", "bool", "int", "big")), 0)

    def _bound(self, depth: int) -> None:
        self.value(self.rng.choice(("int", "none")), 0)

    def _blob(self, depth: int) -> None:
        self.value(self.rng.choice(("bytes", "bytes", "bytearray")), 0)

    def _record(self, depth: int) -> None:
        """An instance of some class, with a state, items or elements; or one that is given two states."""
        rng = self.rng
        self.instance(rng.choice(CLASSES[:7]))
        if rng.random() < 0.3:
            self.put()
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            kind = rng.choice(("dict", "dict", "slots", "any"))
            self.value("dict" if kind == "slots" else kind, depth)
            if kind == "slots":
                self.value("dict", depth)
                self.op(b"\x86", 2, "tuple")
            self.op(b"b", 1)

    def instance(self, cls: str) -> None:
        """An instance without a state, in one of the spellings."""
        module, _, name = cls.rpartition(".")
        way = self.rng.randrange(8)
        if way == 0:
            self.op(b"(", 0, "mark")
            self.collect(f"i{module}\n{name}\n".encode(), "record")
        elif way == 1:
            self.mark()
            self.name(cls)
            self.collect(b"o", "record")
        elif way == 2:
            self.call("copyreg._reconstructor", 0, lambda: self.name(cls), lambda: self.name("builtins.object"),
                      lambda: self._none(0))
        else:
            self.name(cls)
            self.op(b")", 0, "tuple")
            if way == 3:
                self.op(b"}", 0, "dict")
            self.op(b"\x92" if way == 3 else b"\x81", 3 if way == 3 else 2, "record")
        self.stack[-1] = Thing("record", True)

    # ---- numpy -------------------------------------------------------------------------------------------------------
    def _code(self, depth: int) -> None:
        self.text(self.rng.choice(tuple(DTYPES) if self.rng.random() < 0.9 else _ODD_DTYPES))

    def _dtype(self, depth: int) -> None:
        self.dtype(self.rng.choice(tuple(DTYPES) if self.rng.random() < 0.95 else _ODD_DTYPES))

    def dtype(self, code: str) -> None:
        order = "|" if code == "O8" else "<" if self.tidy else self.rng.choice("<<<<>|=")
        self.call("numpy.dtype", 0, lambda: self.text(code), lambda: self._bool(0), lambda: self._bool(0))
        self.mark()
        self.number(3)
        self.text(order)
        for _ in range(3):
            self._none(0)
        for number in (-1, -1, self.rng.choice((0, 0, 63))):
            self.number(number)
        self.collect(b"t", "tuple")
        self.op(b"b", 1)
        self.stack[-1] = Thing("dtype")

    def numbers(self, *values: int) -> None:
        self.mark()
        for value in values:
            self.number(value)
        self.collect(b"t", "tuple", hashable=True)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.rng.choice((1, 1, 2, 3, 4)) for _ in range(self.rng.randrange(5)))

    def _shape(self, depth: int) -> None:
        self.numbers(*(self.rng.choice((1, 2, 3, *NUMBERS[:10], -1)) for _ in range(self.rng.randrange(4))))

    def _ndarray(self, depth: int) -> None:
        self.name("numpy.ndarray")

    def _order(self, depth: int) -> None:
        self.text(self.rng.choice("CF"))

    def _letter(self, depth: int) -> None:
        self.blob(b"b")

    def unfilled(self) -> None:
        self.call(f"numpy.{self.rng.choice(('core', '_core'))}.multiarray._reconstruct", 0, lambda: self._ndarray(0),
                  lambda: self.numbers(0), lambda: self._letter(0))

    def _array(self, depth: int) -> None:
        rng, shape, code = self.rng, self.shape(), self.rng.choice(tuple(DTYPES))
        data = rng.randbytes(prod(shape) * DTYPES[code] + (rng.random() < 0.005))
        if rng.random() < 0.3:
            self.call("numpy._core.numeric._frombuffer", 0, lambda: self.blob(data), lambda: self.dtype(code),
                      lambda: self.numbers(*shape), lambda: self._order(0))
        else:
            self.filled(shape, code, lambda: self.blob(data))
        self.stack[-1] = Thing("array")

    def filled(self, shape: tuple[int, ...], code: str, content: Callable[[], None]) -> None:
        """`_reconstruct`, and the state that fills it; at times somebody refers to it before."""
        self.unfilled()
        if self.rng.random() < 0.3:
            self.put()
        self.mark()
        self.number(1)
        self.numbers(*shape)
        self.dtype(code)
        self._bool(0)
        content()
        self.collect(b"t", "tuple")
        self.op(b"b", 1)
        if not self.tidy and self.rng.random() < 0.003:  # and filled again
            self.op(b"2", 0, self.stack[-1])
            self.op(b"b", 1)

    def _objects(self, depth: int) -> None:
        shape = self.shape() if self.rng.random() < 0.3 else (self.rng.randrange(4),)

        def content() -> None:
            self.mark()
            for _ in range(min(prod(shape), 20)):
                self.value(self.rng.choice(("any", "array", "objects")), depth) if depth > 0 else self.value("int", 0)
            self.collect(b"l", "list")

        self.filled(shape, "O8", content)
        self.stack[-1] = Thing("objects")

    # ---- torch -------------------------------------------------------------------------------------------------------
    def _storage(self, depth: int) -> None:
        known = tuple(STORAGE_BYTES)[: 7 if self.rng.random() < 0.97 else 9]
        self.storage(self.rng.choice(known), self.rng.randrange(1, 40))

    def storage(self, cls: str, numel: int) -> int:
        """A persistent id of a new storage, or one that is there already; how many numbers it has."""
        rng, key = self.rng, str(len(self.storages))
        if self.storages and rng.random() < 0.3:
            key = rng.choice(sorted(self.storages))
            cls, numel = self.storages[key]
        self.storages[key] = cls, numel
        self.mark()
        self.text("storage")
        self.name(f"torch.{cls}")
        self.text(key)
        self.text("cpu")
        self.number(numel if rng.random() < 0.99 else rng.choice(NUMBERS))
        if rng.random() < 0.1:
            self._none(0)
        self.collect(b"t", "tuple")
        self.op(b"Q", 1, "storage")
        return numel

    def _tensor(self, depth: int) -> None:
        if not self.outside and self.rng.random() < 0.97:
            self._array(depth)
            return
        rng, shape = self.rng, self.shape()
        stride = [prod(shape[k + 1 :]) for k in range(len(shape))]
        if rng.random() < 0.2:
            rng.shuffle(stride)
        odd = rng.random() < 0.03

        def arguments() -> None:
            numel = self.storage(rng.choice(tuple(STORAGE_BYTES)[:7]), prod(shape) + rng.randrange(3))
            self.number(rng.choice((0, 0, 0, 1, numel)) if odd else 0)
            self.numbers(*shape)
            self.numbers(*(stride if not odd else [rng.choice((*NUMBERS, -1)) for _ in shape]))

        name = rng.choice(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"))
        rest = [lambda: self._bool(0), lambda: self.call("collections.OrderedDict", 0)]
        self.call(name, 0, arguments, *rest[: 2 * name.endswith("v2")])
        self.stack[-1] = Thing("array")
        if rng.random() < 0.2:
            self.get(self.put())
            self.op(b"0", 1)

    def _function(self, depth: int) -> None:
        self.name(self.rng.choice(("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "a.b")))

    def _view(self, depth: int) -> None:
        """The arguments of _rebuild_tensor."""
        self.mark()
        self.value("storage", 0)
        self.number(0)
        self.numbers(1)
        self.numbers(1)
        self.collect(b"t", "tuple")

    def _module(self, depth: int) -> None:
        """An instance with parameters, buffers and modules below it; a module may be there twice, or be its own child."""
        rng, name = self.rng, self.rng.choice(CLASSES[:4] + CLASSES[5:6])
        self.instance(name)
        place = self.put()
        self.mark()
        for key, kind in (("training", "bool"), ("_parameters", "array"), ("_buffers", "array"), ("_modules", "module"),
                          ("kernel_size", "shape"), ("groups", "int"), ("_non_persistent_buffers_set", "set")):
            self.text(key)
            if not key.startswith("_") or kind == "set":
                self.value(kind, depth)
                continue
            self.op(b"}", 0, "dict")
            for _ in range(rng.randrange(3) if depth > 0 else 0):
                self.text(rng.choice(TEXTS))
                self.get(place) if kind == "module" and rng.random() < 0.02 else self.value(kind, depth)
                self.op(b"s", 2)
        self.collect(b"d", "dict")
        self.op(b"b", 1)
        self.stack[-1] = Thing("module", True)
