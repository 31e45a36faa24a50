"""Removing the zero filters of a residual network while keeping its function.

A zero filter is not silent: behind its BatchNorm and ReLU it emits the constant k = relu(beta - gamma mean / sigma).
Where the next conv does not pad, k times its weights is a constant too, and folds into that conv's BatchNorm exactly.
Where it pads with zeros, the constant plane has borders: then all the constants of a layer share one kept channel, a
zero filter whose BatchNorm emits 1 and whose weights in the next conv are the sum over the removed channels of k times
theirs. A filter that writes the residual stream becomes an output in no branch; its BatchNorm, as everything else that
reads it, stays. A block whose residual branch is constant becomes relu(shortcut + constant).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning import masks
from gkp.pruning.models.branched import BranchedConv2d
from gkp.pruning.models.residual import ResidualBlock


@dataclass(frozen=True)
class Compression:
    """model: the compressed network. removed: conv -> how many filters are gone. carriers: convs that keep one zero
    filter as the carrier of constants. blocks: whose residual branch is gone. inexact: convs in front of which constants
    were folded although they pad with zeros, so the outputs at their borders differ."""

    model: nn.Module
    removed: dict[str, int] = field(default_factory=dict)
    carriers: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)


def zero_filters(model: nn.Module, convs: Iterable[str], threshold: float) -> dict[str, torch.Tensor]:
    """Conv name -> bool [F]: the filters whose L2 norm is at most the threshold.

    UsageError: one of the names is not an ordinary convolution, or a weight is not finite."""
    zero = {}
    for name in convs:
        weight = masks.conv_named(model, name).weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise UsageError(f"the weights of {name} are not finite", "start from a network whose training did not diverge")
        zero[name] = torch.linalg.vector_norm(weight.flatten(1).double(), dim=1) <= threshold
    return zero


def zeroed(model: nn.Module, zero: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the network in which these filters are zero exactly. zero: conv name -> bool [F]."""
    result = copy.deepcopy(model)
    masks.apply_masks(result, {name: ~gone[:, None] for name, gone in zero.items()})
    return result


def compress(model: nn.Module, zero: Mapping[str, torch.Tensor], exact: bool = True) -> Compression:
    """What `zeroed(model, zero)` computes in eval mode, without these filters.

    zero: conv name -> bool [F], of convs inside residual blocks. exact: keep a carrier of constants where a conv pads;
    without it the function changes there, at the borders of the planes, and `inexact` says where.
    UsageError: a conv that is in no residual block.
    """
    done = Compression(zeroed(model, zero).eval())
    inside: set[str] = set()
    for prefix, block in list(done.model.named_modules()):
        if isinstance(block, ResidualBlock) and block.has_residual:
            names = [f"{prefix}.{conv}" for conv, _ in block.chain]
            inside.update(names)
            none = {name: torch.zeros(masks.conv_named(model, name).out_channels, dtype=torch.bool) for name in names}
            _compress_block(prefix, block, [zero.get(name, none[name]) for name in names], exact, done)
    if set(zero) - inside:
        raise UsageError(f"{min(set(zero) - inside)} is no convolution of a residual block", "prune convs inside the blocks")
    return done


def _compress_block(prefix: str, block: ResidualBlock, gone: list[torch.Tensor], exact: bool, done: Compression) -> None:
    links = [(block.get_submodule(conv), block.get_submodule(norm)) for conv, norm in block.chain]
    names = [f"{prefix}.{conv}" for conv, _ in block.chain]
    for place in reversed(range(len(links))):
        if bool(gone[place].all()):
            constant, borders = _constant_behind(links, place)
            if borders is None or not exact:
                if borders is not None:
                    done.inexact.append(names[borders])
                done.removed.update({name: len(mask) for name, mask in zip(names, gone, strict=True)})
                done.blocks.append(prefix)
                _remove_residual(block, constant)
                return
    done.removed.update({name: int(mask.sum()) for name, mask in zip(names, gone, strict=True) if bool(mask.any())})
    for place in range(len(links) - 1):
        if bool(gone[place].any()):
            _drop_between(block, place, gone[place], exact, names, done)
    if bool(gone[-1].any()):
        last = masks.conv_named(block, block.chain[-1][0])
        kept = ~gone[-1][:, None].expand(-1, last.in_channels)
        setattr(block, block.chain[-1][0], BranchedConv2d(masks.form_of_mask(last, kept.numpy())))


def _drop_between(
    block: ResidualBlock, place: int, gone: torch.Tensor, exact: bool, names: list[str], done: Compression
) -> None:
    """Remove the zero filters of one conv of the chain: with their BatchNorm channels, and from the conv that follows."""
    (conv_name, norm_name), (next_name, next_norm) = block.chain[place], block.chain[place + 1]
    conv, norm, follower = (block.get_submodule(name) for name in (conv_name, norm_name, next_name))
    constants = torch.relu(_normalised(norm, _bias(conv)))
    weight = follower.weight.detach().double()
    loud = gone & (constants != 0) & (weight != 0).any(0).flatten(1).any(1)
    taps = (weight[:, loud] * constants[loud].reshape(1, -1, 1, 1)).sum(1)
    kept = torch.nonzero(~gone).flatten()
    carries = bool(loud.any()) and exact and _pads(follower)
    if bool(loud.any()) and not carries:
        shifted = block.get_submodule(next_norm)
        shifted.running_mean.copy_(shifted.running_mean.double() - taps.sum((1, 2)))
        if _pads(follower):
            done.inexact.append(names[place + 1])
    columns = [weight[:, kept], *([taps[:, None]] if carries else [])]
    setattr(block, conv_name, _rows(conv, kept, extra=carries))
    setattr(block, norm_name, _channels(norm, kept, extra=carries))
    setattr(block, next_name, _like(follower, torch.cat(columns, 1), follower.bias))
    if carries:
        done.carriers.append(names[place])


def _constant_behind(links: list[tuple[nn.Module, nn.Module]], place: int) -> tuple[torch.Tensor, int | None]:
    """What the branch yields, float64 [F], if conv number `place` yields zero; and the first later conv at whose borders
    that is wrong, None if there is none."""
    borders = None
    conv, norm = links[place]
    value = _normalised(norm, _bias(conv))
    for later, (conv, norm) in enumerate(links[place + 1 :], place + 1):
        value = torch.relu(value)
        weight = conv.weight.detach().double()
        if borders is None and _pads(conv) and bool((weight * value.reshape(1, -1, 1, 1)).any()):
            borders = later
        value = _normalised(norm, weight.sum((2, 3)) @ value + _bias(conv))
    return value, borders


def _remove_residual(block: ResidualBlock, constant: torch.Tensor) -> None:
    """The constant goes into the BatchNorm of a conv shortcut, else it stays a tensor of the block."""
    if isinstance(block.downsample, nn.Sequential) and isinstance(block.downsample[-1], nn.BatchNorm2d):
        bias = block.downsample[-1].bias
        bias.data = (bias.detach().double() + constant).to(bias.dtype)
        constant = torch.zeros_like(constant)
    block.remove_residual(constant.float() if bool(constant.any()) else None)


# ---- parts -----------------------------------------------------------------------------------------------------------
def _rows(conv: nn.Conv2d, kept: torch.Tensor, extra: bool) -> nn.Conv2d:
    """The conv with these filters only, and a zero filter behind them if `extra`."""
    weight = conv.weight.detach()[kept]
    bias = None if conv.bias is None else conv.bias.detach()[kept]
    if extra:
        weight = torch.cat((weight, torch.zeros_like(conv.weight[:1])))
        bias = None if bias is None else torch.cat((bias, bias.new_zeros(1)))
    return _like(conv, weight, bias)


def _like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    new = nn.Conv2d(weight.shape[1], weight.shape[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                    bias=bias is not None)
    state = {"weight": weight.float()} | ({} if bias is None else {"bias": bias})
    new.load_state_dict(state)
    return new.eval()


def _channels(norm: nn.BatchNorm2d, kept: torch.Tensor, extra: bool) -> nn.BatchNorm2d:
    """The norm of these channels only, and of one more if `extra`: it emits 1, whatever happens to its input, and goes
    on doing so in training, since nothing but its bias has a gradient."""
    last = {"weight": 0.0, "bias": 1.0, "running_mean": 0.0, "running_var": 1.0}
    new = nn.BatchNorm2d(len(kept) + extra, norm.eps, norm.momentum)
    for name, value in last.items():
        channels = getattr(norm, name).detach()[kept]
        getattr(new, name).data.copy_(torch.cat((channels, channels.new_full((int(extra),), value))))
    return new.eval()


def _normalised(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """The norm in eval mode of the constant planes x, float64 [F]."""
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return norm.bias.detach().double() + (x - norm.running_mean.double()) * scale


def _bias(conv: nn.Conv2d) -> torch.Tensor:
    """What the conv adds to its outputs, float64 [F]."""
    bias = conv.bias
    return torch.zeros(conv.out_channels, dtype=torch.float64) if bias is None else bias.detach().double()


def _pads(conv: nn.Conv2d) -> bool:
    return any(p > 0 for p in conv.padding)
