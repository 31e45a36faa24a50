"""The trainable form of a branched convolution: what the pruning systems publish, as one PyTorch module.

State dict of a `BranchedConv2d` called `<name>`:
  <name>.channels                  int64 [2]: out_channels, in_channels
  <name>.in_index, .in_sizes       int64: the input channels that each branch reads, laid end to end; how many each
  <name>.out_index, .out_sizes     int64: the same for the output channels
  <name>.weight                    [sum(out_sizes), in_sizes[0], kh, kw], a grouped conv's, if branches are equal-sized
  <name>.weight_0 .. weight_{n-1}  [out_sizes[b], in_sizes[b], kh, kw] otherwise
  <name>.bias                      [out_channels], only when it is not all zero
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gkp.branched import Branch, BranchedConv
from gkp.errors import UnsupportedModelError
from gkp.types import Array


class BranchedConv2d(nn.Module):  # type: ignore[misc]
    """y = bias; y[:, out_b] += conv(x[:, in_b], W_b) for each branch b. x float [N, C, H, W] -> y [N, F, H', W'].

    Equal-sized branches run as gather, one grouped conv, gather; others as n gathers, n convs, concat, gather.
    A gather that would change nothing is left out. UnsupportedModelError: `form` is not two-dimensional.
    """

    def __init__(self, form: BranchedConv) -> None:
        super().__init__()
        if len(form.kernel_shape) != 2:
            raise UnsupportedModelError(f"BranchedConv2d cannot hold a kernel of shape {form.kernel_shape}")
        self.in_channels = form.in_channels
        self.out_channels = form.out_channels
        self.kernel_shape = tuple(form.kernel_shape)
        self.strides = tuple(form.strides)
        self.pads = tuple(form.pads)
        self.dilations = tuple(form.dilations)
        self.equal = len({b.weight.shape for b in form.branches}) == 1
        self.register_buffer("channels", _index((form.out_channels, form.in_channels)))
        self.register_buffer("in_index", _index(c for b in form.branches for c in b.in_index))
        self.register_buffer("in_sizes", _index(len(b.in_index) for b in form.branches))
        self.register_buffer("out_index", _index(f for b in form.branches for f in b.out_index))
        self.register_buffer("out_sizes", _index(len(b.out_index) for b in form.branches))
        weights = [torch.from_numpy(np.array(b.weight, dtype=np.float32)) for b in form.branches]
        self.weight_names = ["weight"] if self.equal else [f"weight_{b}" for b in range(len(weights))]
        for name, weight in zip(self.weight_names, [torch.cat(weights)] if self.equal else weights, strict=True):
            self.register_parameter(name, nn.Parameter(weight))
        bias = torch.from_numpy(np.array(form.bias, dtype=np.float32))
        self.bias = nn.Parameter(bias) if bool(bias.any()) else None
        self.register_buffer("_restore", torch.empty(0, dtype=torch.int64), persistent=False)
        self._derive()
        self.register_load_state_dict_post_hook(_derive_after_load)

    def _derive(self) -> None:
        """Recompute what follows from the index lists; runs again after every load_state_dict."""
        self.reads = tuple(self.in_sizes.tolist())
        written = len(self.out_index)
        # Output f is plane _restore[f] of the branches laid end to end; one in no branch reads the zero plane behind.
        restore = torch.full((self.out_channels,), written, dtype=torch.int64, device=self.out_index.device)
        restore[self.out_index] = torch.arange(written, device=self.out_index.device)
        self._restore = restore
        self.all_written = written == self.out_channels
        self.gathers_in = not _is_range(self.in_index, self.in_channels)
        self.gathers_out = not _is_range(self.out_index, self.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._branches(x)
        if self.gathers_out:
            y = y.index_select(1, self._restore)
        return y if self.bias is None else y + self.bias.reshape(1, -1, 1, 1)

    def _branches(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of the branches, one branch after the other, and a zero plane if some output is in no branch."""
        if not self.reads:
            return self._conv(x[:, :1], x.new_zeros(1, 1, *self.kernel_shape), 1)
        y = self._grouped(x) if self.equal else self._split(x)
        # y * 0 and not new zeros: an exported graph then needs no shape arithmetic.
        return y if self.all_written else torch.cat((y, y[:, :1] * 0), 1)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        if self.gathers_in:
            x = x.index_select(1, self.in_index)
        return self._conv(x, self.weight, len(self.reads))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        parts, start = [], 0
        for name, size in zip(self.weight_names, self.reads, strict=True):
            branch_input = x.index_select(1, self.in_index[start : start + size])
            parts.append(self._conv(branch_input, getattr(self, name), 1))
            start += size
        return torch.cat(parts, 1)

    def _conv(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        top, left, bottom, right = self.pads
        if (top, left) == (bottom, right):
            return F.conv2d(x, weight, None, self.strides, (top, left), self.dilations, groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, self.strides, 0, self.dilations, groups)

    def to_branched(self) -> BranchedConv:
        """The numpy form with the present weights (copied)."""
        weights = [_array(getattr(self, name)) for name in self.weight_names]
        bias = np.zeros(self.out_channels, np.float32) if self.bias is None else _array(self.bias)
        arrays = {name: _array(getattr(self, name)) for name in ("in_index", "in_sizes", "out_index", "out_sizes")}
        return BranchedConv(
            in_channels=self.in_channels, out_channels=self.out_channels, branches=branches_from_arrays(arrays, weights),
            bias=bias, kernel_shape=self.kernel_shape, strides=self.strides, pads=self.pads, dilations=self.dilations)

    def extra_repr(self) -> str:
        return (f"{self.in_channels}, {self.out_channels}, branches={len(self.reads)}, stride={self.strides}, "
                f"pads={self.pads}, dilation={self.dilations}")


def branches_from_arrays(arrays: Mapping[str, Array], weights: list[Array]) -> tuple[Branch, ...]:
    """Branches from the flattened lists in_index, in_sizes, out_index, out_sizes (int64, 1-D) and the weights.

    weights: one array per branch, or a single one in grouped-conv layout. ValueError: the sizes do not add up.
    """
    ins = _split_list(arrays["in_index"], arrays["in_sizes"])
    outs = _split_list(arrays["out_index"], arrays["out_sizes"])
    if len(weights) == 1 and len(outs) > 1:
        weights = np.split(weights[0], np.cumsum(arrays["out_sizes"])[:-1])
    return tuple(Branch(i, o, w) for i, o, w in zip(ins, outs, weights, strict=True))


def _split_list(index: Array, sizes: Array) -> list[Array]:
    if index.ndim != 1 or sizes.ndim != 1 or (sizes < 0).any() or int(sizes.sum()) != len(index):
        raise ValueError("index list and branch sizes disagree")
    return np.split(index, np.cumsum(sizes)[:-1]) if len(sizes) else []


def _derive_after_load(module: BranchedConv2d, _incompatible: object) -> None:
    module._derive()


def _is_range(index: torch.Tensor, stop: int) -> bool:
    return len(index) == stop and bool((index == torch.arange(stop, device=index.device)).all())


def _index(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor([int(v) for v in values], dtype=torch.int64)


def _array(tensor: torch.Tensor) -> Array:
    return np.array(tensor.detach().cpu().numpy())
