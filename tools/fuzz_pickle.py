"""Pickles written opcode by opcode, with an eye on what the machine that reads them holds: most of them are read to the end.

A `Writer` knows what lies on the stack, above which marks, and in the memo. It writes values of a kind that is asked for, in
one of the spellings that protocols 0 to 5 have for them. What is called, and what instances there are: fuzz_checkpoint.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**40, 2**60)
TEXTS = ("", "a", "weight", "bias", "conv1", "state_dict", "net", "model", "epoch", "layer1.0.conv1", "x" * 300, "\x1b[31m",
         "../x", "\u00e9\u4e2d", "\U0001f600", "os", "system", "_modules", "\u202e", "a.b", "0")
DANGEROUS = ("os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.getattr", "builtins.__import__",
             "runpy.run_path", "torch.load", "torch.hub.load", "numpy.load", "operator.attrgetter", "functools.partial",
             "shutil.rmtree", "socket.create_connection", "pickle.loads", "importlib.import_module",
             "torch.storage._load_from_bytes", "copyreg.__newobj__", "nt.system", "types.CodeType", "builtins.open")

@dataclass(eq=False)
class Thing:
    """What the machine holds. kind: "int", "list", ..., "mark"; may it be a key of a dict?"""

    kind: str
    hashable: bool = False


@dataclass
class Writer:
    """Writes one pickle. wrong: the share of values that are not of the kind that fits."""

    FLAT: ClassVar[tuple[str, ...]] = ("int", "str", "none", "bool", "float", "bytes", "global", "empty", "bytearray")
    DEEP: ClassVar[tuple[str, ...]] = ("list", "dict", "tuple", "set", "frozenset")
    NAMES: ClassVar[tuple[str, ...]] = ("a.b", "collections.OrderedDict")
    rng: Random
    wrong: float = 0.004
    out: list[bytes] = field(default_factory=list)
    stack: list[Thing] = field(default_factory=list)
    memo: list[Thing] = field(default_factory=list)

    # ---- the machine -------------------------------------------------------------------------------------------------
    def op(self, code: bytes, takes: int = 0, gives: Thing | str | None = None, hashable: bool = False) -> Thing | None:
        self.out.append(code)
        if takes:
            del self.stack[-takes:]
        thing = Thing(gives, hashable) if isinstance(gives, str) else gives
        if thing is not None:
            self.stack.append(thing)
        return thing

    def mark(self) -> None:
        self.op(b"(", 0, "mark")

    def above(self) -> list[Thing]:
        """What lies above the last mark."""
        kinds = [thing.kind for thing in self.stack][::-1]
        count = kinds.index("mark") if "mark" in kinds else len(kinds)
        return self.stack[len(self.stack) - count :]

    def collect(self, code: bytes, gives: Thing | str | None, below: int = 0, hashable: bool = False) -> None:
        """An opcode that takes everything above the last mark, and `below` objects from under it."""
        self.op(code, len(self.above()) + 1 + below, gives, hashable)

    def put(self) -> int:
        """Remember what is on top, in one of the spellings."""
        index, rng = len(self.memo), self.rng
        self.memo.append(self.stack[-1])
        ways = [b"p%d\n" % index, b"r" + struct.pack("<I", index), b"\x94"] + [b"q" + bytes([index % 256])] * (index < 256)
        self.op(rng.choice(ways))
        return index

    def get(self, index: int) -> None:
        ways = [b"g%d\n" % index, b"j" + struct.pack("<I", index)] + [b"h" + bytes([index % 256])] * (index < 256)
        self.op(self.rng.choice(ways), 0, self.memo[index])

    # ---- values ------------------------------------------------------------------------------------------------------
    def value(self, kind: str, depth: int = 3) -> None:
        """Push a value of this kind: new, or one from the memo; at times of another kind."""
        rng = self.rng
        if rng.random() < self.wrong:
            kind = "any"
        known = [k for k, thing in enumerate(self.memo[-40:], max(0, len(self.memo) - 40)) if thing.kind == kind]
        if known and rng.random() < 0.15:
            self.get(rng.choice(known))
            return
        make: Callable[[int], None] = getattr(self, f"_{kind}")
        make(depth - 1)
        if rng.random() < 0.2:
            self.put()

    def _any(self, depth: int) -> None:
        self.value(self.rng.choice(self.FLAT if depth <= 0 or self.rng.random() < 0.4 else self.DEEP), depth)

    def _key(self, depth: int) -> None:
        if self.rng.random() < 0.03:
            self.mark()
            for _ in range(self.rng.randrange(4)):
                self.value(self.rng.choice(("str", "int")), 0)
            self.collect(b"t", "tuple", hashable=True)
        else:
            self.value(self.rng.choice(("str", "str", "str", "int", "none", "bytes", "float", "global")), 0)

    def _none(self, depth: int) -> None:
        self.op(b"N", 0, "none", True)

    def _bool(self, depth: int) -> None:
        self.op(self.rng.choice((b"\x88", b"\x89", b"I01\n", b"I00\n")), 0, "bool", True)

    def _int(self, depth: int) -> None:
        rng = self.rng
        n = rng.choice((rng.randrange(16), rng.randrange(16), rng.choice(NUMBERS), -rng.choice(NUMBERS)))
        self.number(n)

    def number(self, n: int) -> None:
        ways = [b"I%d\n" % n, b"L%dL\n" % n, b"\x8a" + bytes([9]) + n.to_bytes(9, "little", signed=True),
                struct.pack("<ci", b"\x8b", 9) + n.to_bytes(9, "little", signed=True)]
        if -(2**31) <= n < 2**31:
            ways += [b"J" + struct.pack("<i", n)] * 3
        if 0 <= n < 65536:
            ways += [b"M" + struct.pack("<H", n)] * 2
        if 0 <= n < 256:
            ways += [b"K" + bytes([n])] * 3
        self.op(self.rng.choice(ways), 0, "int" if abs(n) < 2**61 - 1 else "big", abs(n) < 2**61 - 1)

    def _big(self, depth: int) -> None:
        size = self.rng.choice((9, 9, 9, 9, 9, 33, 255, 256, 5000))
        if size == 9:
            self.number(self.rng.choice((2**61 - 1, -(2**61), 2**62, 2**63 - 1, -(2**63), 2**64)))
            return
        data = self.rng.randbytes(size - 1) + b"\x7f"
        ways = [struct.pack("<ci", b"\x8b", size) + data, b"I" + b"7" * size + b"\n", b"L" + b"9" * size + b"L\n"]
        self.op(self.rng.choice(ways + [b"\x8a" + bytes([size % 256]) + data] * (size < 256)), 0, "big")

    def _float(self, depth: int) -> None:
        x = self.rng.choice((0.0, 1.5, -1e30, float("inf"), float("nan"), 0.1))
        self.op(self.rng.choice((b"G" + struct.pack(">d", x), b"F%r\n" % x)), 0, "float", True)

    def _str(self, depth: int) -> None:
        self.text(self.rng.choice(TEXTS))

    def text(self, text: str) -> None:
        data = text.encode()
        ways = [b"X" + struct.pack("<I", len(data)) + data, b"\x8d" + struct.pack("<Q", len(data)) + data]
        ways += [b"\x8c" + bytes([len(data) % 256]) + data] * (2 * (len(data) < 256))
        if text.isascii() and text.isprintable() and "\\" not in text:
            ways += [b"V" + data + b"\n", b"S'" + data + b"'\n", b"T" + struct.pack("<i", len(data)) + data]
            ways += [b"U" + bytes([len(data) % 256]) + data] * (len(data) < 256)
        self.op(self.rng.choice(ways), 0, "str", True)

    def _latin(self, depth: int) -> None:
        self.text("".join(map(chr, self.rng.randbytes(4))))

    def _latin1(self, depth: int) -> None:
        self.text(self.rng.choice(("latin1", "latin1", "latin-1", "utf-8")))

    def _bytes(self, depth: int) -> None:
        self.blob(self.rng.randbytes(self.rng.choice((0, 1, 4, 8, 16, 300))))

    def blob(self, data: bytes) -> None:
        ways = [b"B" + struct.pack("<I", len(data)) + data, b"\x8e" + struct.pack("<Q", len(data)) + data]
        self.op(self.rng.choice(ways + [b"C" + bytes([len(data) % 256]) + data] * (len(data) < 256)), 0, "bytes", True)

    def _bytearray(self, depth: int) -> None:
        data = self.rng.randbytes(self.rng.randrange(9))
        self.op(b"\x96" + struct.pack("<Q", len(data)) + data, 0, "bytearray")

    def _empty(self, depth: int) -> None:
        code, kind = self.rng.choice(((b"]", "list"), (b"}", "dict"), (b")", "tuple"), (b"\x8f", "set"), (b"(l", "list"),
                                      (b"(d", "dict"), (b"(t", "tuple"), (b"(\x91", "frozenset")))
        self.op(code, 0, kind)

    def _list(self, depth: int) -> None:
        rng, way = self.rng, self.rng.randrange(3)
        if way == 2:
            self.mark()
        else:
            self.op(b"]", 0, "list")
            if rng.random() < 0.3:
                self.put()
        if way == 1:
            self.mark()
        for _ in range(rng.randrange(5)):
            self.value("any", depth)
            if way == 0:
                self.op(b"a", 1)
        if way:
            self.collect(b"e" if way == 1 else b"l", None if way == 1 else "list")

    def _tuple(self, depth: int) -> None:
        count = self.rng.randrange(5)
        if 1 <= count <= 3 and self.rng.random() < 0.6:
            flat = True
            for _ in range(count):
                self.value("any", depth)
                flat = flat and self.stack[-1].hashable and self.stack[-1].kind != "tuple"
            self.op(bytes([0x84 + count]), count, "tuple", flat)
            return
        self.mark()
        for _ in range(count):
            self.value("any", depth)
        self.collect(b"t", "tuple")

    def _dict(self, depth: int) -> None:
        self.mapping([("key", "any")] * self.rng.randrange(5), depth)

    def mapping(self, items: list[tuple[str, str]], depth: int) -> None:
        """A dict of these (kind or "=text", kind)."""
        way = self.rng.randrange(3)
        self.op(b"(" if way == 2 else b"}", 0, "mark" if way == 2 else "dict")
        if way == 1:
            self.mark()
        for key, kind in items:
            self.text(key[1:]) if key.startswith("=") else self.value(key, 0)
            self.value(kind, depth)
            if way == 0:
                self.op(b"s", 2)
        if way:
            self.collect(b"u" if way == 1 else b"d", None if way == 1 else "dict")

    def _set(self, depth: int) -> None:
        self.op(b"\x8f", 0, "set")
        self.members(b"\x90", None)

    def _frozenset(self, depth: int) -> None:
        self.members(b"\x91", "frozenset")

    def members(self, code: bytes, gives: str | None) -> None:
        self.mark()
        for _ in range(self.rng.randrange(4)):
            self.value("key", 0)
        self.collect(code, gives)

    def _global(self, depth: int) -> None:
        self.name(self.rng.choice(DANGEROUS if self.rng.random() < 0.015 else self.NAMES))

    def name(self, dotted: str) -> None:
        module, _, name = dotted.rpartition(".")
        if self.rng.random() < 0.5:
            self.op(f"c{module}\n{name}\n".encode(), 0, "global", True)
        else:
            self.text(module)
            self.text(name)
            self.op(b"\x93", 2, "global", True)
