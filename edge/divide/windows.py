"""Windows that slide over rows: which rows of the input a range of output rows needs, and which padding is left."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.branched import BranchedConv
from gkp.converter.graph import Node

Rows = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Along axis 2: kernel, stride, dilation, padding before and after. all_pads: of every spatial axis, begins then
    ends."""

    kernel: int
    stride: int
    dilation: int
    all_pads: tuple[int, ...]

    @classmethod
    def of_conv(cls, conv: BranchedConv) -> Window:
        return cls(conv.kernel_shape[0], conv.strides[0], conv.dilations[0], tuple(conv.pads))

    @property
    def before(self) -> int:
        return self.all_pads[0]

    @property
    def after(self) -> int:
        return self.all_pads[len(self.all_pads) // 2]

    @property
    def span(self) -> int:
        """Rows from the first to the last tap."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def divisible(self) -> bool:
        """Does every window see at least one real row?"""
        return self.before < self.span and self.after < self.span

    def _seen(self, out: Rows) -> Rows:
        """Rows that the windows see, padding included."""
        return out[0] * self.stride - self.before, (out[1] - 1) * self.stride - self.before + self.span

    def rows(self, out: Rows, all_out: Rows, all_in: Rows) -> Rows:
        """Rows of the input that the given rows of the output need."""
        if out == all_out:
            return all_in
        first, end = self._seen(out)
        return max(first, 0), min(end, all_in[1])

    def pads(self, out: Rows, all_out: Rows, all_in: Rows) -> Rows:
        """The padding before and after these rows: only at the real borders."""
        if out == all_out:
            return self.before, self.after
        first, end = self._seen(out)
        return max(0, -first), min(self.after, max(0, end - all_in[1]))

    def with_pads(self, pads: Rows) -> list[int]:
        """The pads of all spatial axes, with those of the rows replaced."""
        found = list(self.all_pads)
        found[0], found[len(found) // 2] = pads
        return found


def window_of(node: Node) -> Window:
    """The window of a stock Conv or pool without auto_pad."""
    rank = len(node.inputs[0].shape) - 2
    kernel = node.attrs.get("kernel_shape") or list(node.inputs[1].shape[2:])
    pads = node.attrs.get("pads") or [0] * 2 * rank
    return Window(int(kernel[0]), int((node.attrs.get("strides") or [1])[0]), int((node.attrs.get("dilations") or [1])[0]),
                  tuple(int(p) for p in pads))
