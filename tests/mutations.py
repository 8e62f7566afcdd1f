"""Mistakes that were easy to make, each with the test that must notice (run by mutate.py)."""

from importlib import import_module
from pathlib import Path

from mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

_FILES = sorted(path.stem for path in Path(__file__).parent.glob("mutations_*.py"))
MUTATIONS: list[Mutation] = [mutation for name in _FILES for mutation in import_module(name).MUTATIONS]
