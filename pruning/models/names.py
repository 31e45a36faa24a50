"""How a checkpoint calls what we call otherwise: errors name what stands in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from gkp.text import clean

_DEEPEST = 8  # parts of a name of ours


class FileNames:
    """From our names of tensors and modules back to the checkpoint's, also of those that it lacks.

    canonical: our name of what the checkpoint calls so; names: of the checkpoint's tensors."""

    def __init__(self, canonical: Callable[[str], str], names: Iterable[str]) -> None:
        self._theirs = {canonical(name): name for name in names}

    def __call__(self, name: str) -> str:
        """The checkpoint's name of what we call `name`, fit to be shown; made of the names beside it where it has none."""
        return clean(self._of(name), 120)

    def _of(self, name: str) -> str:
        parts = tuple(name.split("."))
        if name in self._theirs or len(parts) > _DEEPEST:
            return self._theirs.get(name, name)
        starts, places = self._tables
        known = next((end for end in range(len(parts), 0, -1) if parts[:end] in starts), 0)
        rest = (places.get((place, part), part) for place, part in enumerate(parts) if place >= known)
        return ".".join((*starts.get(parts[:known], ()), *rest))

    @cached_property
    def _tables(self) -> tuple[dict[tuple[str, ...], tuple[str, ...]], dict[tuple[int, str], str]]:
        """The first parts of a name, ours and theirs; a part of ours in its place, and theirs."""
        starts: dict[tuple[str, ...], tuple[str, ...]] = {}
        places: dict[tuple[int, str], str] = {}
        for ours_whole, theirs_whole in self._theirs.items():
            ours = ours_whole.split(".", _DEEPEST)
            theirs = theirs_whole.split(".", 2 * _DEEPEST)
            first = len(theirs) - len(ours)  # a prefix in front, or a sequence that we do not have
            if len(ours) > _DEEPEST or first < 0:
                continue
            theirs = [".".join(theirs[: first + 1]), *theirs[first + 1 :]]
            for end in range(1, len(ours) + 1):
                starts.setdefault(tuple(ours[:end]), tuple(theirs[:end]))
            places |= {(place, part): theirs[place] for place, part in enumerate(ours)}
        return starts, places
