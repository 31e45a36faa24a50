"""A plan as C++: sources, weights and a build script in one folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

from gkp.converter.native.building.toolchain import FLAGS, LIBRARIES, LINK
from gkp.converter.native.kernels.kernel import FUNCTION
from gkp.converter.native.kernels.prelude import prelude
from gkp.converter.native.planning.plan import Call, Fill, Place, Plan
from gkp.converter.native.program import Port

FORMAT = 2
"""Version of what gkp_describe returns."""

_ALIGN = 64
_SHARED_MACS = 1_500_000
"""Multiply-accumulates per step, on average: about ten microseconds of a core."""
_TEMPLATES = Path(__file__).with_name("templates")
_PLAIN = ("model.h", "pool.h", "processor.h")


def write(plan: Plan, folder: Path, shared: bool | None = None) -> list[str]:
    """Write everything that makes model.so into the folder; the names of the files.

    One kernel_<n>.cpp per distinct kernel, one copy of equal weights. shared: may several threads compute one image
    together (default: where the steps are long enough for it). Names from the model are in describe.json only, as ASCII.
    build.sh builds with these files alone."""
    kernels = {source: n for n, source in enumerate(dict.fromkeys(call.kernel.source for call in plan.calls))}
    weights, offsets = _pack(call.kernel.data for call in plan.calls)
    about = describe(plan, len(weights))
    files: dict[str, str | bytes] = {name: (_TEMPLATES / name).read_text("ascii") for name in _PLAIN}
    files["gkp.h"] = prelude(plan.cpu)
    files |= {f"kernel_{n}.cpp": re.sub(rf"\b{FUNCTION}\b", f"kernel_{n}", source) for source, n in kernels.items()}
    needs = {need for call in plan.calls for need in call.kernel.needs}
    files["processor.cpp"] = _fill("processor.cpp", {"FEATURES": "\n".join(_features(needs))})
    files["model.cpp"] = _model(plan, kernels, offsets, _shared(plan) if shared is None else shared)
    files["weights.bin"], files["describe.json"] = weights, about
    digest = hashlib.sha256(weights)
    digest.update(about.encode())
    files["weights.S"] = _fill("weights.S", {"DIGEST": digest.hexdigest()})  # compilers' caches do not see what it includes
    files["build.sh"] = _fill("build.sh", {"CPU": " ".join(plan.cpu.flags), "FLAGS": " ".join(FLAGS),
                                           "LINK": " ".join(LINK), "LIBRARIES": " ".join(LIBRARIES)})
    for name, content in files.items():
        (folder / name).write_bytes(content.encode("ascii") if isinstance(content, str) else content)
    (folder / "build.sh").chmod(0o755)
    return list(files)


def describe(plan: Plan, weights: int) -> str:
    """What gkp_describe returns. arena_bytes: working memory per thread; group_bytes: what a thread takes beside it when
    batches are computed; peak_bytes: of one thread, with the weights."""
    arena, group = _arena(plan), _lines(plan.group.bytes) * (plan.group.images - 1)

    def ports(of: tuple[Port, ...]) -> list[dict[str, object]]:
        return [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype.name} for p in of]

    about = {"format": FORMAT, "cpu": plan.cpu.name, "inputs": ports(plan.inputs), "outputs": ports(plan.outputs),
             "arena_bytes": arena, "group_bytes": group, "weights_bytes": weights, "peak_bytes": arena + group + weights,
             "steps": [{"layer": c.layer, "kind": c.kind, "macs": c.macs, "needs": c.kernel.needs} for c in plan.calls]}
    return json.dumps(about, ensure_ascii=True).replace("\x7f", "\\u007f")


def _pack(blobs: Iterable[bytes]) -> tuple[bytes, list[int]]:
    """Blobs one after another, aligned, equal ones once; where each begins."""
    packed, known, offsets = bytearray(), {b"": 0}, list[int]()
    for blob in blobs:
        if blob not in known:
            packed += bytes(-len(packed) % _ALIGN)
            known[blob] = len(packed)
            packed += blob
        offsets.append(known[blob])
    return bytes(packed), offsets


def _arena(plan: Plan) -> int:
    """Bytes of one arena: whole cache lines, and at least one."""
    return max(_ALIGN, _lines(plan.arena))


def _lines(size: int) -> int:
    """Bytes of whole cache lines."""
    return -(-size // _ALIGN) * _ALIGN


def _shared(plan: Plan) -> bool:
    """Is it worth while to compute one image on several threads? They meet after every step, which takes some
    microseconds, and have to be woken first."""
    return sum(call.macs for call in plan.calls) >= _SHARED_MACS * len(plan.calls)


def _model(plan: Plan, kernels: Mapping[str, int], offsets: list[int], shared: bool) -> str:
    return _fill("model.cpp", {
        "KERNELS": "\n".join(f"KERNEL(kernel_{n});" for n in kernels.values()),
        "ARENA": str(_arena(plan)), "GROUP": str(plan.group.images), "FURTHER": str(_lines(plan.group.bytes)),
        "SHARED": "true" if shared else "false", "COUNT": str(len(plan.calls)),
        "INPUTS": str(len(plan.inputs)), "OUTPUTS": str(len(plan.outputs)),
        "INPUT_BYTES": ", ".join(str(p.bytes) for p in plan.inputs),
        "OUTPUT_BYTES": ", ".join(str(p.bytes) for p in plan.outputs),
        "FILLS": _fills(plan.fills), "FURTHER_FILLS": _fills(plan.group.fills),
        "INPUT_ELEMENT": ", ".join(str(p.dtype.bytes) for p in plan.inputs),
        "OUTPUT_ELEMENT": ", ".join(str(p.dtype.bytes) for p in plan.outputs),
        "STEPS": "\n".join(_step(n, call, kernels[call.kernel.source], offset)
                           for n, (call, offset) in enumerate(zip(plan.calls, offsets, strict=True)))})


def _features(needs: Set[str]) -> Iterator[str]:
    """What features.txt lists: an instruction set, and where cpuid says whether it is there. Those that compilers use by
    themselves go by their macros, the others by what the kernels need."""
    for line in (_TEMPLATES / "features.txt").read_text("ascii").splitlines()[1:]:
        told_by, name, *where = line.split()
        row = f'    NEED("{name}", {", ".join(where)})'
        if told_by.startswith("__"):
            yield f"#ifdef {told_by}\n{row}\n#endif"
        elif told_by in needs:
            yield row


def _step(number: int, call: Call, kernel: int, offset: int) -> str:
    places = ", ".join(map(_place, (call.x, call.r, call.y)))
    kind = re.sub(r"[^A-Za-z0-9 .+_-]", " ", call.kind)
    return f"    {{kernel_{kernel}, {places}, {offset}, {call.together}}},  // {number}: {kind}".rstrip(": ")


def _place(place: Place | None) -> str:
    if place is None:
        return "none"
    return f"{place.where}({place.at})" if place.further is None else f"own({place.at}, {place.further})"


def _fills(fills: Iterable[Fill]) -> str:
    return "".join(f"    {{{f.first}, {f.bytes}, {f.value}}},\n" for f in fills)


def _fill(template: str, values: Mapping[str, str]) -> str:
    text = (_TEMPLATES / template).read_text("ascii")
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], text)
