"""The output directory: written beside the destination, verified there, renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkp.errors import BackendMissingError, FileError, GkpError, UsageError
from gkp.manifest import FILE_NAME, Manifest
from gkp.report import html, wording
from gkp.runtime.load import load
from gkp.text import clean
from gkp.types import Array


@dataclass(frozen=True, repr=False)
class Artefact:
    """What a conversion wrote. directory is None after a dry run; incomplete: why a part that was asked for is not there.
    In a notebook it shows the head of its report (where the extra `report` is installed)."""

    directory: Path | None
    manifest: Manifest
    incomplete: GkpError | None = None

    def run(self, x: Array | Mapping[str, Array]) -> Any:
        """Load the artefact and run one batch, as LoadedModel.run does (for repeated calls, keep `gkp.load(directory)`)."""
        if self.directory is None:
            raise UsageError("a dry run wrote no artefact", "convert without dry_run")
        with load(self.directory) as model:
            return model.run(x)

    def __repr__(self) -> str:
        where = "dry run" if self.directory is None else clean(self.directory, 120)
        return (f"<gkp.Artefact {where}: {clean(self.manifest.target, 20)}, {clean(self.manifest.precision, 20)}, "
                f"{wording.headline(self.manifest)}>")

    def _repr_html_(self) -> str | None:
        """None (then notebooks take repr): jinja2 is not here."""
        try:
            return html.render_notebook(self.manifest)
        except BackendMissingError:
            return None


def check_destination(path: Path, force: bool, mark: str = FILE_NAME, writer: str = "gkp") -> None:
    """Refuse a destination that cannot or must not be written, before any work is done. mark: the file by which a folder is
    known that `writer` wrote, and may be overwritten. UsageError, FileError."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a directory", "choose another name with -o")
    if path.is_dir() and any(path.iterdir()):
        if not (path / mark).is_file():
            raise UsageError(f"{path} exists and was not written by {writer}", "choose another directory with -o")
        if not force:
            raise UsageError(f"{path} exists", "overwrite it with --force, or choose another directory with -o")
    parent = path.absolute().parent
    existing = next((p for p in (parent, *parent.parents) if p.exists()), parent)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FileError(f"cannot write to {existing}: permission denied", "choose another directory with -o")


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A fresh directory beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    path = path.absolute()
    made: Path | None = None
    missing = [p for p in path.parents if not p.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        yield made
        made.chmod(0o755)
        _replace(made, path)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror or e}", "free some space or choose another directory") from e
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty: it worked, or others use it by now
                parent.rmdir()


def _replace(made: Path, path: Path) -> None:
    if not path.exists():
        made.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / "old")
    try:
        made.rename(path)
    except OSError:
        (old / "old").rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
