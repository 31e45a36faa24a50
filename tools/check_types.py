"""mypy --strict and the import contract on a built copy of the package.

On the checkout itself both tools would look for a folder called gkp, find none, and report success over nothing; so the
package is copied as it installs, and the number of checked files is compared with the number of files there are.

usage: check_types.py
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(target: Path) -> int:
    """Copy the packages of setup.cfg below `target`; the number of modules."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    count = 0
    for line in config["options"]["package_dir"].strip().splitlines():
        package, folder = (part.strip() for part in line.split("="))
        destination = target / package.replace(".", "/")
        destination.mkdir(parents=True, exist_ok=True)
        for file in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("py.typed")]:
            shutil.copy(file, destination / file.name)
            count += file.suffix == ".py"
    return count


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        count = build(Path(folder))
        env = {**os.environ, "MYPYPATH": folder, "PYTHONPATH": folder}
        mypy = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "gkp"],
                              cwd=folder, env=env, capture_output=True, text=True, check=False)
        print(mypy.stdout, end="")
        print(mypy.stderr, end="")
        checked = re.search(r"(?:checked|found in) (\d+) source files", mypy.stdout)
        if checked is None or int(checked[1]) != count:
            print(f"mypy checked {checked[1] if checked else 'no'} files, the package has {count}")
            return 1
        imports = subprocess.run(["lint-imports", "--config", str(ROOT / ".importlinter"), "--no-cache"], cwd=folder,
                                 env=env, capture_output=True, text=True, check=False)
        print(imports.stdout, end="")
        analyzed = re.search(r"Analyzed (\d+) files", imports.stdout)
        if analyzed is None or int(analyzed[1]) < count:  # it counts the external packages too
            print(f"the import contract saw {analyzed[1] if analyzed else 'no'} files, the package has {count}")
            return 1
        return mypy.returncode or imports.returncode


if __name__ == "__main__":
    sys.exit(main())
