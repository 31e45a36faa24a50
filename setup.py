"""What setup.cfg cannot say: the packages are all that lie in the folders of its package_dir."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser()
config.read(Path(__file__).with_name("setup.cfg"))
roots = [[part.strip() for part in line.split("=")] for line in config["options"]["package_dir"].strip().splitlines()]
setup(packages=[f"{package}{name}" for package, folder in roots for name in ("", *(f".{n}" for n in find_packages(folder)))])
