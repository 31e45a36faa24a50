"""The reader of zip archives under the name by which the sources know it."""

from gkp.archive import Archive

__all__ = ["Archive"]
