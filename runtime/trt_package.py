"""The one place that imports Polygraphy for TensorRT: of a process, only one of the two packages can be behind it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

from gkp.errors import UsageError
from gkp.require import absent, require
from gkp.text import one_line

EXTRAS = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
"""The extra of gkp that installs a package, by its name."""
PACKAGES = tuple(EXTRAS)
_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
_NO_DRIVER = "cudaError 35"
"""Without a driver, TensorRT logs this one behind real errors, and behind none."""


@dataclass(frozen=True)
class TrtPackage:
    """name: "tensorrt" or "tensorrt_rtx"; trt: that module; loaders: polygraphy.backend.trt on top of it, whose
    get_trt_logger() is the one logger of the process; config_class: the loader of a builder's configuration."""

    name: str
    version: str
    trt: Any
    loaders: Any
    config_class: Any


@dataclass
class Log:
    """What TensorRT and Polygraphy said. errors: without the line about a missing driver that follows real ones."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def is_installed(name: str) -> bool:
    """Is there a package of that name? It is not imported: whether it works is not known."""
    try:
        spec = find_spec(name)
        return spec is not None and spec.origin is not None  # None: some folder of that name
    except (ImportError, ValueError):  # of an import hook, or of a module that was put in place by hand
        return False


@cache
def trt_package(name: str) -> TrtPackage:
    """Import a package and Polygraphy for it. From here on, Polygraphy's messages go to Python's logging (logger
    "Polygraphy") instead of stdout. BackendMissingError when one of them is not installed or does not work; UsageError
    when Polygraphy serves the other package in this process."""
    extra = EXTRAS[name]
    try:
        trt = importlib.import_module(name)
    except Exception as e:  # classic wheels fetch their libraries when they are installed, or fail to, and then in any way
        raise absent(name, extra, error=e, note="(or install it again)" if is_installed(name) else "") from e
    if not hasattr(trt, "__version__"):  # some folder of that name
        raise absent(name, extra)
    polygraphy = _polygraphy(name == "tensorrt_rtx", extra)
    if (name == "tensorrt_rtx") != polygraphy.USE_TENSORRT_RTX:
        raise UsageError(f"this process uses Polygraphy with another package than {name}", "start a new process")
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    logger.use_python_logging_system, logger.colors, logger.letter = True, False, False
    loaders = importlib.import_module("polygraphy.backend.trt")
    config = importlib.import_module("polygraphy.backend.tensorrt_rtx").CreateConfigRTX if polygraphy.USE_TENSORRT_RTX \
        else loaders.CreateConfig
    return TrtPackage(name, str(trt.__version__), trt, loaders, config)


@contextlib.contextmanager
def listening() -> Iterator[Log]:
    """Collect the messages of TensorRT and Polygraphy in the block; they are not printed."""
    log, logger = Log(), logging.getLogger("Polygraphy")
    handler, propagates = _Handler(log), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield log
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Handler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        text = one_line(record.getMessage(), 500)
        if record.levelno < logging.ERROR:
            self._log.warnings.append(text)
        elif _NO_DRIVER not in text:
            self._log.errors.append(text)


def _polygraphy(rtx: bool, extra: str) -> Any:
    """polygraphy.config, which reads the switch when it is imported for the first time."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = str(int(rtx))
    try:
        return require("polygraphy.config", extra, note="(TensorRT is used through it)")
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
