"""A mistake and the test that must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` (found exactly once) becomes `new`; `test`, a pytest node id, must then fail."""

    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}  [{self.test}]"


def mutations(file: str, test_file: str, *rows: tuple[str, str, str]) -> list[Mutation]:
    """Rows (old, new, test in `test_file`)."""
    return [Mutation(file, old, new, f"{test_file}::{test}") for old, new, test in rows]
