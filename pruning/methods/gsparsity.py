"""GSparsity: the filters of a trained ResNet are driven to zero by a group-sparse penalty, then removed, then retrained.

Filter pruning of the GSparsity project with ProxSGD (proxsgd.py); published for ResNet-50 on ImageNet only, whose
settings are the defaults here. For CIFAR ResNets the scopes are the analogous ones; no values are published for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec
import torch
from torch import nn

from gkp.errors import UsageError
from gkp.pruning.methods.base import settings_of
from gkp.pruning.methods.gsparsity_compress import Compression, compress, zero_filters, zeroed
from gkp.pruning.methods.gsparsity_form import check_small_model, save_small_model
from gkp.pruning.methods.proxsgd import Normalization, ProxSGD
from gkp.pruning.models.residual import ResidualBlock
from gkp.pruning.training import Hooks, Recipe

if TYPE_CHECKING:
    from gkp.pruning.models.architecture import Architecture
    from gkp.pruning.session import Session

Scope = Literal["conv12", "all-conv"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]

RESNETS = ("cifar_resnet", "imagenet_resnet", "imagenet_resnet_3x3_stem")


class GsparsitySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """scope: whose filters may go. "conv12": of every conv in a residual block but the last (conv1 and conv2 of a
    bottleneck, the first of a basic block), with gain mu, and twice mu in all stages but the first and the last;
    "all-conv": of all convs in the blocks, with gain mu.

    normalization, rho (called momentum upstream), beta, delta: see ProxSGD. threshold: the L2 norm up to which a filter
    counts as zero. exact: keep the function in compression, see gsparsity_compress.
    batch_size: of both trainings. epochs, lr, milestones: of the search; retrain_*: of plain SGD afterwards; in both lr
    falls to a tenth at each milestone. A filter that loses shrinks by 1 - lr a step, so from norm n to the threshold t it
    takes ln(n / t) / lr steps: 14,000 from 1 at the defaults, three epochs of ImageNet, but 70 of CIFAR-10; fewer need a
    larger lr or threshold (upstream's masks have thresholds up to 0.1).
    """

    scope: Scope = "conv12"
    mu: NotNegative = 0.05
    normalization: Normalization = "div"
    rho: Rate = 0.9
    beta: Share = 0.999
    delta: NotNegative = 1e-8
    threshold: NotNegative = 1e-6
    exact: bool = True
    batch_size: Annotated[int, msgspec.Meta(ge=1)] = 256
    epochs: Count = 90
    lr: Rate = 1e-3
    milestones: tuple[Count, ...] = (30, 60)
    retrain_epochs: Count = 90
    retrain_lr: Rate = 0.1
    retrain_momentum: Share = 0.9
    retrain_weight_decay: NotNegative = 1e-4
    retrain_milestones: tuple[Count, ...] = (30, 60)


class Gsparsity:
    """See the module."""

    name: ClassVar[str] = "gsparsity"
    summary: ClassVar[str] = "filters removed by group-sparse training"
    settings: ClassVar[type[msgspec.Struct]] = GsparsitySettings

    def read_settings(self, payload: Mapping[str, Any]) -> GsparsitySettings:
        return settings_of(GsparsitySettings, payload)

    def run(self, session: Session, settings: GsparsitySettings) -> None:
        factors = prunable(session.arch, session.baseline, settings.scope)
        if session.wants_public:
            check_small_model(session.baseline, session.arch, settings.scope)
        model = _search(session, settings, factors)
        zero = zero_filters(model, factors, settings.threshold)
        masked = zeroed(model, zero)
        compression = compress(model, zero, settings.exact)
        report(session, zero, compression, settings.threshold)
        gone, total = sum(int(mask.sum()) for mask in zero.values()), sum(len(mask) for mask in zero.values())
        session.save("pruned", masked, zero_filters=gone, prunable_filters=total)
        session.save(
            "grouped", compression.model, carriers=len(compression.carriers), blocks_removed=len(compression.blocks),
            inexact_layers=len(compression.inexact), compression_error=difference(session, masked, compression.model),
        )
        recipe = Recipe(settings.retrain_epochs, settings.retrain_lr, settings.retrain_momentum,
                        settings.retrain_weight_decay, settings.batch_size, settings.retrain_milestones)
        session.train("retrain", compression.model, recipe)
        session.save("finetuned", compression.model)
        session.public(f"small_model_{settings.scope}_{settings.threshold}.pth.tar",
                       lambda path, _: save_small_model(path, compression.model, session.arch))


def prunable(arch: Architecture, model: nn.Module, scope: Scope) -> dict[str, float]:
    """Conv whose filters may go -> factor of the gain mu, in the network's order (see GsparsitySettings.scope).

    UsageError: not a ResNet, or one whose convs are in branches already."""
    if arch.family not in RESNETS:
        raise UsageError(f"gsparsity prunes the filters of ResNets, not of {arch.name}", "use another method")
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, ResidualBlock)}
    stages = list(dict.fromkeys(name.partition(".")[0] for name in blocks))
    factors = {}
    for name, block in blocks.items():
        chain = block.chain if scope == "all-conv" else block.chain[:-1]
        inner = scope == "conv12" and name.partition(".")[0] in stages[1:-1]
        for conv, _ in chain:
            if not isinstance(block.get_submodule(conv), nn.Conv2d):
                raise UsageError(f"{name}.{conv} is in branches already", "start from a dense network")
            factors[f"{name}.{conv}"] = 2.0 if inner else 1.0
    return factors


def parameter_groups(model: nn.Module, gains: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters as ProxSGD takes them: those of one gain together, all others with None.

    gains: conv name -> gain of its filters; its bias, if any, has none."""
    of = {f"{name}.weight": gain for name, gain in gains.items()}
    found: dict[float | None, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(of.get(name), []).append(parameter)
    return [{"params": parameters, "gain": gain} for gain, parameters in found.items()]


def _search(session: Session, settings: GsparsitySettings, factors: Mapping[str, float]) -> nn.Module:
    """The network after group-sparse training; untrained it is the baseline's copy."""
    gains = {name: settings.mu * factor for name, factor in factors.items()}

    def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        return ProxSGD(parameter_groups(model, gains), recipe.lr, rho=settings.rho, beta=settings.beta,
                       delta=settings.delta, normalization=settings.normalization)

    model = zeroed(session.baseline, {})
    recipe = Recipe(settings.epochs, settings.lr, weight_decay=0.0, batch_size=settings.batch_size,
                    milestones=settings.milestones)
    session.train("search", model, recipe, Hooks(optimizer=optimizer, keep="last"))
    return model


def report(session: Session, zero: Mapping[str, torch.Tensor], compression: Compression, threshold: float) -> None:
    """One line per conv in experiment.log, then what compression could not do without a trace."""
    for name, mask in zero.items():
        session.log(f"{name}: {int(mask.sum())} of {len(mask)} filters are zero")
    if not any(bool(mask.any()) for mask in zero.values()):
        session.log(f"no filter is zero (norm at most {threshold:g}), so nothing is pruned: more steps, a larger lr, mu or "
                    "threshold would change that")
    if compression.carriers:
        session.log(f"one zero filter stays as the carrier of constants, because the next conv pads with zeros, in: "
                    f"{', '.join(compression.carriers)}")
    if compression.blocks:
        session.log(f"the residual branch is constant and gone in: {', '.join(compression.blocks)}")
    if compression.inexact:
        session.log(f"not exact at the borders, where zeros are padded (exact: false), in front of: "
                    f"{', '.join(compression.inexact)}")


def difference(session: Session, a: nn.Module, b: nn.Module) -> float:
    """Largest absolute difference of the logits on two random images, over the largest absolute logit of a."""
    x = torch.randn(2, *session.arch.input_shape, generator=session.torch_rng("compression error"))
    with torch.inference_mode():
        expected, found = a.eval()(x), b.eval()(x)
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
