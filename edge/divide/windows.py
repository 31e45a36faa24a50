"""Windows that slide over rows: which rows of the input a range of output rows needs, and which padding is left."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.converter.graph import Node
from gkp.edge.divide.tiles import whole

Rows = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Along axis 2. span: rows from the first to the last tap; all_pads: of every spatial axis, begins then ends; all_in,
    all_out: the rows of the input and of the output."""

    span: int
    stride: int
    all_pads: tuple[int, ...]
    all_in: Rows
    all_out: Rows

    @property
    def before(self) -> int:
        return self.all_pads[0]

    @property
    def after(self) -> int:
        return self.all_pads[len(self.all_pads) // 2]

    @property
    def divisible(self) -> bool:
        """Does every window see at least one real row?"""
        return self.before < self.span and self.after < self.span

    def _seen(self, out: Rows) -> Rows:
        """Rows that the windows see, padding included."""
        return out[0] * self.stride - self.before, (out[1] - 1) * self.stride - self.before + self.span

    def rows(self, out: Rows) -> Rows:
        """Rows of the input that the given rows of the output need."""
        if out == self.all_out:
            return self.all_in
        first, end = self._seen(out)
        return max(first, 0), min(end, self.all_in[1])

    def pads(self, out: Rows) -> list[int]:
        """The pads of all spatial axes for these rows: before and after them only at the real borders."""
        found = list(self.all_pads)
        if out != self.all_out:
            first, end = self._seen(out)
            found[0], found[len(found) // 2] = max(0, -first), min(self.after, max(0, end - self.all_in[1]))
        return found


def window_of(node: Node) -> Window:
    """The window of a convolution or pool without auto_pad."""
    rank = len(node.inputs[0].shape) - 2
    kernel = node.attrs.get("kernel_shape") or node.inputs[1].shape[2:]
    stride, dilation = (int((node.attrs.get(name) or [1])[0]) for name in ("strides", "dilations"))
    pads = tuple(int(p) for p in node.attrs.get("pads") or [0] * 2 * rank)
    return Window(dilation * (int(kernel[0]) - 1) + 1, stride, pads, whole(node.inputs[0]).rows, whole(node.outputs[0]).rows)
