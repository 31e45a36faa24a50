"""mypy and the import contract on a built copy of the package: it and tools/ strictly, tests/ by the rules of TESTS.

On the checkout itself both tools would look for a folder called gkp, find none, and report success over nothing; so the
package is copied as it installs, and the number of checked files is compared with the number of files there are. The tests
are copied as a package too (several of their folders hold a file of the same name), their helpers and the tools beside them,
where those are imported from.

usage: check_types.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from layout import packages

ROOT = Path(__file__).resolve().parents[1]
# Tests hand over wrong values on purpose and look into results that the next line would fail on: what remains checked are
# names, attributes, numbers of arguments, and comments that no longer ignore anything.
TESTS = """
disallow_any_generics = false
disallow_subclassing_any = false
disallow_untyped_calls = false
disallow_untyped_decorators = false
implicit_reexport = true
warn_return_any = false
disable_error_code = ["arg-type", "comparison-overlap", "func-returns-value", "name-defined", "union-attr", "var-annotated"]
"""


def build(target: Path) -> int:
    """Copy the packages below `target`; the number of modules."""
    count = 0
    for package, folder in packages().items():
        destination = target / package.replace(".", "/")
        destination.mkdir(parents=True, exist_ok=True)
        for file in [*folder.glob("*.py"), *folder.glob("py.typed")]:
            shutil.copy(file, destination / file.name)
            count += file.suffix == ".py"
    return count


def build_tests(target: Path) -> int:
    """Copy tests/ below `target` as a package, without the helpers; the number of modules in it."""
    for file in (ROOT / "tests").rglob("*.py"):
        copy = target / file.relative_to(ROOT)
        if "helpers" not in file.parts:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    for folder in [target / "tests", *(path for path in (target / "tests").rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    return len(list((target / "tests").rglob("*.py")))


def settings(target: Path, helpers: list[str]) -> Path:
    """Write mypy's settings to `target`: the project's, and TESTS for the tests and these helpers; the file."""
    file = target / "mypy.toml"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    file.write_text(f"{project}\n[[tool.mypy.overrides]]\nmodule = {['tests.*', *helpers]}\n{TESTS}", encoding="utf-8")
    return file


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        count = build(Path(folder))
        helpers = sorted(file.stem for file in (ROOT / "tests" / "helpers").glob("*.py"))
        tools = sorted(file.stem for file in (ROOT / "tools").glob("*.py"))
        expected = count + build_tests(Path(folder)) + len(helpers) + len(tools)
        env = {**os.environ, "PYTHONPATH": folder,
               "MYPYPATH": os.pathsep.join([folder, str(ROOT / "tests" / "helpers"), str(ROOT / "tools")])}
        alone = [word for name in (*helpers, *tools) for word in ("-m", name)]
        mypy = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(settings(Path(folder), helpers)),
                               "-p", "gkp", "-p", "tests", *alone],
                              cwd=folder, env=env, capture_output=True, text=True, check=False)
        print(mypy.stdout, end="")
        print(mypy.stderr, end="")
        checked = re.search(r"(?:checked|found in) (\d+) source files", mypy.stdout)
        if checked is None or int(checked[1]) != expected:
            print(f"mypy checked {checked[1] if checked else 'no'} files, there are {expected}")
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
