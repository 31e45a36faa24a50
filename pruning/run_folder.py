"""OUT: what a pruning run writes, and what it goes on from after an interruption.

    baseline pruned grouped finetuned   networks (gkp.pruning.models.checkpoint)
    setting.json                        what was asked, and the results so far
    experiment.log                      what happened, line by line
    cluster.json                        TMI-GKP's record of its groups
    checkpoints/                        finished phases and the last epoch of the present one
    public/                             with --public, the last network in the form of the method's own program

Every file is written completely or not at all. Of several processes of a run one writes, all read; another run, while it
works in the folder, is kept out by a lock on experiment.log.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch

from gkp.errors import FileError, GkpError, UsageError
from gkp.files import plain_json, write_file
from gkp.pruning.tensor_file import load_tensors, save_tensors
from gkp.structs import read_json

FORMAT = "gkp.prune"
SCHEMA_VERSION = 1
SETTING, LOG, CHECKPOINTS, PUBLIC = "setting.json", "experiment.log", "checkpoints", "public"
COMPARED = ("schema_version", "method", "model", "baseline", "data", "seed", "epochs", "multi", "mixed_precision",
            "settings")
_MAX_JSON = 256 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# What a process that was killed while it wrote leaves behind: save_tensors and write_file begin with such a name.
_HALF_WRITTEN = re.compile(r"\.(setting\.json|baseline|pruned|grouped|finetuned|.+\.(pt|tar|pkl|json))\.[a-z0-9_]{8}")


class RunFolder:
    """An open run. setting: the content of setting.json. resumed: the folder held the beginning of the same run.

    log: experiment.log, see _open_log; None in a process that does not write. existed: the folder was there, empty.
    replaced: where the run that --force replaces waits."""

    def __init__(self, path: Path, setting: dict[str, Any], *, resumed: bool, log: BinaryIO | None, existed: bool = True,
                 replaced: Path | None = None) -> None:
        self.path, self.setting, self.resumed = path, setting, resumed
        self._log, self._existed, self._replaced = log, existed, replaced

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Stage -> its results."""
        found: dict[str, dict[str, Any]] = self.setting["results"]
        return found

    def log(self, text: str) -> None:
        """Append a line, with the time in front."""
        if self._log is not None:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(text.split())}\n"
            with _as_file_error(self.path / LOG):
                self._log.write(line.encode(errors="backslashreplace"))

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
            payload = load_tensors(path)
        except GkpError as error:
            hint = "remove it to repeat its phase, or begin again with --force"
            raise FileError(f"{path} cannot be read", hint) from error
        if not isinstance(payload, dict):
            raise FileError(f"{path} is not a checkpoint of gkp prune", "begin again with --force")
        return payload

    def write(self, name: str, payload: Mapping[str, Any]) -> None:
        """checkpoints/<name>.pt from what `plain` returned. With it the run has begun: see drop_if_not_begun."""
        path = self._checkpoint(name)
        if self._log is None:
            return
        with _as_file_error(path):
            path.parent.mkdir(exist_ok=True)
        save_tensors(path, dict(payload))
        self._forget_replaced()

    def write_document(self, name: str, content: bytes) -> None:
        """OUT/<name>, beside the stages."""
        if self._log is not None:
            write_file(self.path / _file_name(name), content)

    def write_public(self, name: str, write: Callable[[Path], None]) -> None:
        """public/<name>, which `write` writes atomically at the path it is given. If it fails, no empty folder remains."""
        if self._log is None:
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
        """After a failure: without a finished phase or epoch there is nothing to go on from, so what the run wrote vanishes,
        and what --force replaced is there again. Nothing can be written any more."""
        if self._log is None:
            return
        self._log.close()
        if self.resumed or any((self.path / CHECKPOINTS).glob("*.pt")):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with _as_file_error(self.path):
            if self._replaced is not None:
                self._replaced.rename(self.path)
            elif self._existed:
                self.path.mkdir(exist_ok=True)

    def finish(self) -> None:
        """The run is complete: what --force replaced is no longer needed. Nothing can be written any more."""
        self._forget_replaced()
        if self._log is not None:
            self._log.close()

    def _forget_replaced(self) -> None:
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def _checkpoint(self, name: str) -> Path:
        return self.path / CHECKPOINTS / f"{_file_name(name)}.pt"

    def _write_setting(self) -> None:
        if self._log is not None:
            text = msgspec.json.format(msgspec.json.encode(self.setting), indent=2)
            write_file(self.path / SETTING, plain_json(text) + b"\n")


def open_run(path: Path, setting: Mapping[str, Any], force: bool = False, writes: bool = True) -> RunFolder:
    """Create OUT, or go on with the run in it.

    setting: plain values, at least those of COMPARED, in which a run that is resumed must be the same.
    UsageError: OUT holds something else, or another run and not `force`, or another process works in it. FileError: it
    cannot be written.
    """
    head = {"format": FORMAT, "schema_version": SCHEMA_VERSION}
    asked: dict[str, Any] = msgspec.json.decode(msgspec.json.encode({**head, **setting, "results": {}}))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a directory", "choose another name with -o")
    existed, replaced = path.is_dir(), None
    if existed and not _is_empty(path):
        earlier = _read_setting(path)
        different = [key for key in COMPARED if _identity(earlier, key) != _identity(asked, key)]
        if not different and not force:
            log = _open_log(path) if writes else None
            if writes:
                _remove_half_written(path)
            return RunFolder(path, earlier, resumed=True, log=log)
        if not force:
            raise UsageError(f"{path} holds a run with {'another' if len(different) == 1 else 'other'} "
                             f"{', '.join(key.replace('_', ' ') for key in different)}",
                             "overwrite it with --force, or choose another directory with -o")
        if writes:
            with _open_log(path):
                replaced = _set_aside(path)
    if not writes:
        return RunFolder(path, asked, resumed=False, log=None)
    with _as_file_error(path):
        path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path, asked, resumed=False, log=_open_log(path), existed=existed, replaced=replaced)
    try:
        _remove_half_written(path)
        folder._write_setting()
    except BaseException:
        folder.drop_if_not_begun()
        raise
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
        if not file.is_file() or any((path / name).is_symlink() for name in (SETTING, LOG, CHECKPOINTS, PUBLIC)):
            raise foreign  # a link: to write where it leads?
        content = read_json(file, dict[str, Any], limit=_MAX_JSON, what="the setting of a run", hint="")
    except (OSError, FileError) as error:
        raise foreign from error
    results = content.get("results") if content.get("format") == FORMAT else None
    if not isinstance(results, dict) or not all(isinstance(stage, dict) for stage in results.values()):
        raise foreign
    return content


def _open_log(path: Path) -> BinaryIO:
    """experiment.log, to append to; it stays locked until it is closed. UsageError: another process has locked it."""
    with _as_file_error(path / LOG):
        file = (path / LOG).open("ab", buffering=0)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UsageError(f"another process is working in {path}",
                         "wait for it, or choose another directory with -o") from None
    except OSError:  # a file system without locks
        pass
    return file


def _is_empty(path: Path) -> bool:
    """Does the folder hold nothing, or what a process leaves that is killed before it has written setting.json?"""
    return all(_HALF_WRITTEN.fullmatch(entry.name) or (entry.name == LOG and entry.lstat().st_size == 0)
               for entry in path.iterdir())


def _remove_half_written(path: Path) -> None:
    for folder in (path, path / CHECKPOINTS, path / PUBLIC):
        for entry in folder.glob(".*"):
            if _HALF_WRITTEN.fullmatch(entry.name):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


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
