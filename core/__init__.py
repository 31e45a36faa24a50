"""gkp makes grouped-pruned CNNs fast: it opens their checkpoints, rewrites them into one exact form, and writes what is
fastest on the target.

    gkp.convert("model.pt", target="ort")      -> Artefact
    gkp.load("model.ort")                      -> LoadedModel
    gkp.load("model.ort").run(x)               -> outputs
    gkp.open("model.pt").layers                -> the model in the one form
    gkp.BranchedConv                           -> the form itself
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gkp._version import __version__

if TYPE_CHECKING:
    from gkp.api import Model, convert, load, open
    from gkp.branched import Branch, BranchedConv
    from gkp.converter.artefact import Artefact
    from gkp.errors import GkpError
    from gkp.runtime.load import LoadedModel

_HOMES = {"Artefact": "converter.artefact", "BranchedConv": "branched", "Branch": "branched", "GkpError": "errors",
          "LoadedModel": "runtime.load", "Model": "api", "convert": "api", "load": "api", "open": "api"}
__all__ = ["Artefact", "Branch", "BranchedConv", "GkpError", "LoadedModel", "Model", "__version__", "convert", "load",
           "open"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import gkp` needs numpy only where it is used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gkp' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gkp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
