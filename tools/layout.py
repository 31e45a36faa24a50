"""Where the packages lie in the checkout, as setup.py finds them."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def packages() -> dict[str, Path]:
    """Package -> its folder: those of setup.cfg's package_dir, and every folder with an __init__.py below them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = {}
    for line in config["options"]["package_dir"].strip().splitlines():
        package, folder = (part.strip() for part in line.split("="))
        for file in sorted((ROOT / folder).rglob("__init__.py")):
            found[".".join([package, *file.parent.relative_to(ROOT / folder).parts])] = file.parent
    return found
