"""OUT: what a pruning run writes, and what it goes on from after an interruption.

    baseline pruned grouped finetuned   networks (gkp.pruning.models.checkpoint)
    setting.json                        what was asked, and the results so far
    experiment.log                      what happened, line by line
    cluster.json                        TMI-GKP's record of its groups
    checkpoints/                        finished phases and the last epoch of the present one
    public/                             with --public, the last network in the form of the method's own program

Every file is written completely or not at all. Of several processes one writes; all read.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from gkp.errors import FileError, UsageError
from gkp.files import plain_json, write_file

FORMAT = "gkp.prune"
SCHEMA_VERSION = 1
SETTING, LOG, CHECKPOINTS, PUBLIC = "setting.json", "experiment.log", "checkpoints", "public"
COMPARED = ("method", "model", "baseline", "data", "seed", "epochs", "multi", "mixed_precision", "settings")
_MAX_JSON = 256 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class RunFolder:
    """An open run. setting: the content of setting.json. resumed: the folder held the beginning of the same run."""

    def __init__(self, path: Path, setting: dict[str, Any], resumed: bool, writes: bool, replaced: Path | None) -> None:
        self.path, self.setting, self.resumed = path, setting, resumed
        self._writes, self._replaced = writes, replaced

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Stage -> its results."""
        found: dict[str, dict[str, Any]] = self.setting["results"]
        return found

    def log(self, text: str) -> None:
        """Append a line, with the time in front."""
        if self._writes:
            with _as_file_error(self.path / LOG), (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(text.split())}\n")

    def record(self, stage: str, results: Mapping[str, Any]) -> None:
        """Set a stage's results in setting.json."""
        self.results[stage] = dict(results)
        self._write_setting()

    def read(self, name: str) -> dict[str, Any] | None:
        """checkpoints/<name>.pt, or None. FileError: it is damaged."""
        path = self._checkpoint(name)
        if not path.is_file():
            return None
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            hint = "remove it to repeat its phase, or begin again with --force"
            raise FileError(f"{path} cannot be read", hint) from error
        if not isinstance(payload, dict):
            raise FileError(f"{path} is not a checkpoint of gkp prune", "begin again with --force")
        return payload

    def write(self, name: str, payload: Mapping[str, Any]) -> None:
        """checkpoints/<name>.pt from what `plain` returned. With it the run has begun: see drop_if_not_begun."""
        path = self._checkpoint(name)
        if not self._writes:
            return
        with _as_file_error(path):
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
                torch.save(dict(payload), Path(folder) / path.name)
                os.replace(Path(folder) / path.name, path)
        self._forget_replaced()

    def write_document(self, name: str, content: bytes) -> None:
        """OUT/<name>, beside the stages."""
        if self._writes:
            write_file(self.path / _file_name(name), content)

    def write_public(self, name: str, write: Callable[[Path], None]) -> None:
        """public/<name>, which `write` writes atomically at the path it is given. If it fails, no empty folder remains."""
        if not self._writes:
            return
        folder = self.path / PUBLIC
        with _as_file_error(folder):
            folder.mkdir(exist_ok=True)
        try:
            write(folder / _file_name(name))
        except BaseException:
            with contextlib.suppress(OSError):  # not empty: another run of the same command wrote it
                folder.rmdir()
            raise

    def drop_if_not_begun(self) -> None:
        """After a failure: without a finished phase or epoch there is nothing to go on from, so the folder vanishes, and
        what --force replaced is there again."""
        if not self._writes or self.resumed or any((self.path / CHECKPOINTS).glob("*.pt")):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced is not None:
            self._replaced.rename(self.path)

    def finish(self) -> None:
        """The run is complete: what --force replaced is no longer needed."""
        self._forget_replaced()

    def _forget_replaced(self) -> None:
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def _checkpoint(self, name: str) -> Path:
        return self.path / CHECKPOINTS / f"{_file_name(name)}.pt"

    def _write_setting(self) -> None:
        if self._writes:
            text = msgspec.json.format(msgspec.json.encode(self.setting), indent=2)
            write_file(self.path / SETTING, plain_json(text) + b"\n")


def open_run(path: Path, setting: Mapping[str, Any], force: bool = False, writes: bool = True) -> RunFolder:
    """Create OUT, or go on with the run in it.

    setting: plain values, at least those of COMPARED, in which a run that is resumed must be the same.
    UsageError: OUT holds something else, or another run and not `force`. FileError: it cannot be written.
    """
    head = {"format": FORMAT, "schema_version": SCHEMA_VERSION}
    asked: dict[str, Any] = msgspec.json.decode(msgspec.json.encode({**head, **setting, "results": {}}))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a directory", "choose another name with -o")
    replaced = None
    if path.is_dir() and any(path.iterdir()):
        earlier = _read_setting(path)
        different = [key for key in COMPARED if _identity(earlier, key) != _identity(asked, key)]
        if not different and not force:
            return RunFolder(path, earlier, resumed=True, writes=writes, replaced=None)
        if not force:
            raise UsageError(f"{path} holds a run with {'another' if len(different) == 1 else 'other'} "
                             f"{', '.join(key.replace('_', ' ') for key in different)}",
                             "overwrite it with --force, or choose another directory with -o")
        replaced = _set_aside(path) if writes else None
    folder = RunFolder(path, asked, resumed=False, writes=writes, replaced=replaced)
    if writes:
        with _as_file_error(path):
            path.mkdir(parents=True, exist_ok=True)
        folder._write_setting()
    return folder


def plain(value: Any) -> Any:
    """The same in what a checkpoint may hold: tensors (copied to the CPU), numbers, strings, None, lists, tuples, dicts.

    TypeError: it holds anything else.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value) if type(value) in (list, tuple) else [plain(e) for e in value]
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _file_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a file name")
    return name


def _identity(setting: Mapping[str, Any], key: str) -> Any:
    value = setting.get(key)
    return value.get("sha256") if key == "baseline" and isinstance(value, dict) else value


def _read_setting(path: Path) -> dict[str, Any]:
    """setting.json of an earlier run. UsageError: this is not a folder of `gkp prune`."""
    file = path / SETTING
    foreign = UsageError(f"{path} exists and was not written by gkp prune", "choose another directory with -o")
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _MAX_JSON:
            raise foreign
        content = msgspec.json.decode(file.read_bytes())
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise foreign from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("results"), dict):
        raise foreign
    return content


def _set_aside(path: Path) -> Path:
    """Move an earlier run out of the way; the name under which it waits."""
    with _as_file_error(path):
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent))
        aside.rmdir()
        path.rename(aside)
    return aside


@contextlib.contextmanager
def _as_file_error(path: Path) -> Any:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise FileError(f"cannot write {path}: {reason}", "free some space or choose another place with -o") from error
