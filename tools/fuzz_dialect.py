"""Archives of TorchScript whose pickles are in the language of torch's pickler, or in one that is nearly that.

The code declares modules with attributes of many types; `data.pkl` holds modules with attributes of these types, at times of
another, or said in a way that torch's unpickler and Python's understand differently.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from fuzz_zip import archive

TYPES = ("Tensor", "int", "float", "bool", "str", "List[int]", "List[float]", "List[Tensor]", "Tuple[int, int]",
         "Optional[Tensor]", "Optional[int]", "Dict[str, int]", "Dict[str, Tensor]", "Tuple[Tensor, List[int]]", "NoneType",
         "Device", "List[str]", "List[bool]")
_LISTS = {"int": b"int", "float": b"double", "bool": b"bool", "Tensor": b"tensor"}
_NUMBERS = (0, 1, 2, 255, 256, 65535, 2**31 - 1, -1, 2**62, -(2**63))
_TAGS = ("List[int]", "Dict[str, int]", "List[Tensor]", "int", "List[" * 30 + "]" * 30, "List[__torch__.C0]",
         "List[__torch__.Z]", "List[" + "x" * 2000 + "]", "List[List[int]]", "Dict[str, Any]", "", "List[int", "Tuple[int]")

ODDITIES = (
    *(b"<value>}b", b"<object>", b"<object>}b}b", b"<object>Nb", b"<value>0<value>", b"<value>2", b"](<value>e(<value>e"),
    *(b"}(X\1\0\0\0a<value>X\1\0\0\0a<value>u", b"}(<value>Nu", b"}NNs", b"c__torch__\nZ\n)\x81}b", b".", b"(K\1K\2"),
    *(b"c__torch__\nC1\n)\x81}b", b"c__torch__.torch.classes\nX\n)\x81}b", b"cos\nsystem\n", b"ctorch\nload\n)R"),
    *(b"ccollections\nOrderedDict\n)R", b"ctorch\ndevice\n)R", b"\x8a\x01\x05", b"\x8a\x10" + bytes(16), b"\x8c\x01a"),
    *(b"I5\n", b"\x80\x02", b"(l", b"Nr\xff\xff\xff\xff", b"Nr\0\0\0\x10"),
    *(b"cbuiltins\ncomplex\nG" + bytes(8) + b"G" + bytes(8) + b"\x86R",))
"""<value>: what was asked for; <object>: an instance of a class of the archive, without state."""


@dataclass
class Dialect:
    """Writes one pickle. odd: the share of values that are not what was asked for."""

    rng: Random
    classes: list[dict[str, str]] = field(default_factory=list)  # the attributes of each
    odd: float = 0.004
    storages: dict[str, bytes] = field(default_factory=dict)
    memo: int = 0

    def put(self) -> bytes:
        self.memo += 1
        return b"q" + bytes([self.memo - 1]) if self.memo <= 256 else b"r" + struct.pack("<I", self.memo - 1)

    def text(self, text: str) -> bytes:
        data = text.encode()
        return b"X" + struct.pack("<I", len(data)) + data + self.put() * (self.rng.random() < 0.5)

    def number(self, n: int) -> bytes:
        if 0 <= n < 65536:
            return b"K" + bytes([n]) if n < 256 else b"M" + struct.pack("<H", n)
        return b"J" + struct.pack("<i", n) if -(2**31) <= n < 2**31 else b"\x8a\x08" + struct.pack("<q", n)

    def tuple(self, parts: list[bytes]) -> bytes:
        if self.rng.random() < 0.5 and 1 <= len(parts) <= 3:
            return b"".join(parts) + bytes([0x84 + len(parts)])
        return b"(" + b"".join(parts) + b"t" if parts else b")"

    def filled(self, empty: bytes, parts: list[bytes]) -> bytes:
        return empty + b"(" + b"".join(parts) + (b"e" if empty == b"]" else b"u") if parts else empty

    def value(self, kind: str, depth: int = 3) -> bytes:
        """A value of a declared type."""
        rng = self.rng
        if rng.random() < self.odd and depth:
            return self.oddity(kind, depth - 1)
        if kind.startswith("__torch__."):
            return self.module(int(kind.removeprefix("__torch__.C")), depth - 1)
        outer, _, inner = kind.removesuffix("]").partition("[")
        if outer == "Optional":
            return b"N" if rng.random() < 0.5 else self.value(inner, depth)
        if outer == "List":
            return self.listed(inner, depth)
        if outer == "Dict":
            item = inner.partition(", ")[2]
            items = [self.text(f"k{k}") + self.value(item, depth) for k in range(rng.randrange(3))]
            return self.tagged(self.filled(b"}", items), kind)
        if outer == "Tuple":
            return self.tuple([self.value(part, depth) for part in inner.split(", ", 1)])
        texts = ("", "a", "zeros", "\u00e9", "\x1b[31m", "x" * 300)
        flat: dict[str, Callable[[], bytes]] = {
            "Tensor": self.tensor, "int": lambda: self.number(rng.choice(_NUMBERS)),
            "bool": lambda: rng.choice((b"\x88", b"\x89")), "NoneType": lambda: b"N",
            "float": lambda: b"G" + struct.pack(">d", rng.choice((0.5, -1e300, float("nan")))),
            "str": lambda: self.text(rng.choice(texts)),
            "Device": lambda: b"ctorch\ndevice\n" + self.tuple([self.text(rng.choice(("cpu", "cuda:0")))]) + b"R"}
        return flat[kind]()

    def listed(self, inner: str, depth: int) -> bytes:
        body = self.filled(b"]", [self.value(inner, depth) for _ in range(self.rng.randrange(4))])
        if inner in _LISTS:
            return b"ctorch.jit._pickle\nbuild_" + _LISTS[inner] + b"list\n" + body + b"\x85R"
        return self.tagged(body, f"List[{inner}]")

    def tagged(self, body: bytes, tag: str) -> bytes:
        return b"ctorch.jit._pickle\nrestore_type_tag\n" + self.tuple([body, self.text(tag)]) + b"R"

    def tensor(self) -> bytes:
        rng, key = self.rng, str(len(self.storages))
        shape = [rng.choice((1, 2, 3)) for _ in range(rng.randrange(4))]
        numel = 1
        stride: list[int] = []
        for n in shape[::-1]:
            stride.insert(0, numel)
            numel *= n
        kind, size = rng.choice((("Float", 4), ("Float", 4), ("Long", 8), ("Half", 2), ("BFloat16", 2), ("Bool", 1)))
        self.storages[key] = rng.randbytes(size * numel)
        numbers = [shape, stride, [0, numel]]
        if rng.random() < self.odd * 4:
            rng.choice(numbers)[:] = [rng.choice(_NUMBERS) for _ in range(2)]
        pid = self.tuple([self.text("storage"), b"ctorch\n%sStorage\n" % kind.encode(), self.text(key), self.text("cpu"),
                          self.number(numbers[2][1])]) + b"Q"
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + self.tuple(
            [pid, self.number(numbers[2][0]), *(self.tuple([self.number(n) for n in part]) for part in numbers[:2]),
             b"\x88" if rng.random() < 0.5 and kind.endswith(("Float", "Half", "BFloat16")) else b"\x89",
             b"ccollections\nOrderedDict\n)R"]) + b"R"

    def module(self, k: int, depth: int) -> bytes:
        rng, attributes = self.rng, list(self.classes[k].items())
        if rng.random() < self.odd * 2 and attributes:
            attributes.insert(rng.randrange(len(attributes) + 1), rng.choice((rng.choice(attributes), ("more", "int"))))
        state = self.filled(b"}", [self.text(name) + self.value(kind, depth) for name, kind in attributes])
        made = b"c__torch__\nC%d\n)\x81" % k + state + b"b"
        return made + self.put() if rng.random() < 0.3 else made

    def oddity(self, kind: str, depth: int) -> bytes:
        """Something else than this, or this in another way."""
        rng, way = self.rng, self.rng.randrange(10)
        if way < 2:
            return self.value(rng.choice(TYPES), depth)
        there = self.value(kind, 0)
        if way < 7:
            return rng.choice(ODDITIES).replace(b"<object>", b"c__torch__\nC0\n)\x81").replace(b"<value>", there)
        count = rng.choice((5, 190, 210, 3000))
        if way == 7:
            begin, end = rng.choice(((b"](", b"e"), (b"]", b"a"), (b"", b"\x85"), (b"(", b"t"), (b"}(X\1\0\0\0a", b"u")))
            return begin * count + b"N" + end * count
        if way == 8:
            return self.tagged(rng.choice((there, self.filled(b"]", [there]), b"}")), rng.choice(_TAGS))
        gets = b"h" + bytes([rng.randrange(max(1, min(self.memo, 256)))])
        return rng.choice((self.shared(min(count, 210)), gets, b"]" + self.put() + b"(" + there + b"e", there + self.put(),
                           b"c__torch__\nC0\n)\x81" + self.put() + b"}b"))

    def shared(self, count: int) -> bytes:
        parts = [b"N"]
        for _ in range(count):
            put = self.put()
            get = {b"q": b"h", b"r": b"j"}[put[:1]] + put[1:]
            parts.append(put + b"0" + get * 2 + b"\x86")
        return b"".join(parts)


def script(rng: Random) -> bytes:
    """The archive."""
    classes: list[dict[str, str]] = []
    for k in range(rng.randrange(1, 5)):
        attributes = {"training": "bool"} | {f"a{n}": rng.choice(TYPES) for n in range(rng.randrange(6))}
        attributes |= {f"m{n}": f"__torch__.C{rng.randrange(k)}" for n in range(rng.randrange(3) if k else 0)}
        classes.append(attributes)
    code = "".join(_class(k, attributes) for k, attributes in enumerate(classes))
    data = Dialect(rng, classes, rng.choice((0, 0.01, 0.05)))
    root = b"\x80\x02" + data.value(f"__torch__.C{len(classes) - 1}", 5) + b"."
    constants = Dialect(rng, classes, rng.choice((0, 0, 0.05)))
    few = b"\x80\x02" + constants.tuple([constants.value(rng.choice(TYPES)) for _ in range(rng.randrange(3))]) + b"."
    members = [("data.pkl", root), ("byteorder", b"little"), *((f"data/{k}", x) for k, x in data.storages.items()),
               ("version", b"3\n"), ("code/__torch__.py", code.encode()), ("constants.pkl", few),
               *((f"constants/{k}", x) for k, x in constants.storages.items())]
    return archive([(f"archive/{name}", content) for name, content in members])


def _class(k: int, attributes: dict[str, str]) -> str:
    tensors = "".join(f'"{name}", ' for name, kind in attributes.items() if kind == "Tensor")
    lines = [f"class C{k}(Module):", f"  __parameters__ = [{tensors}]", "  __buffers__ = []",
             *(f"  {name} : {kind}" for name, kind in attributes.items()),
             f"  def forward(self: __torch__.C{k},\n    x: Tensor) -> Tensor:", "    return torch.relu(x)"]
    return "\n".join(lines) + "\n"
