"""What a pruning method is: settings that JSON can hold, and a run over a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import msgspec

from gkp.errors import UsageError

if TYPE_CHECKING:
    from gkp.pruning.session import Session

S = TypeVar("S", bound=msgspec.Struct)


class Method(Protocol):
    """One pruning method. An instance holds nothing: what a run needs is in its session and its settings.

    settings: a frozen, keyword-only struct that forbids unknown fields; its defaults are the published values for
    ResNet-20 on CIFAR-10.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[type[msgspec.Struct]]

    def read_settings(self, payload: Mapping[str, Any]) -> msgspec.Struct:
        """The settings in a parsed --settings JSON ({}: the defaults). UsageError: unknown, missing or out of range."""
        ...

    def run(self, session: Session, settings: Any) -> None:
        """Go from session.baseline to session.save("grouped", ...) and, where it trains, session.save("finetuned", ...).

        UsageError: settings that do not fit the network. GkpError: the loss became NaN.
        """
        ...


def settings_of(kind: type[S], payload: Mapping[str, Any]) -> S:
    """The payload as a settings struct. UsageError names the first field that is unknown, missing or out of range.

    Ranges are written in the struct itself: `rate: Annotated[float, msgspec.Meta(gt=0, lt=1)]`.
    """
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(f.encode_name for f in msgspec.structs.fields(kind))
        raise UsageError(f"the settings cannot be used: {error}", f"the fields are: {known}") from error
