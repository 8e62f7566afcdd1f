"""The table of `make mutate` has not gone stale: what it changes is there once, and the tests that must notice exist."""

import subprocess
import sys
from pathlib import Path

import launch
from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_changed_is_there_once():
    stale = [str(m) for m in MUTATIONS if (ROOT / m.file).read_text().count(m.old) != 1]
    assert not stale, stale


def test_the_tests_that_must_notice_exist():
    files = sorted({m.test.partition("::")[0] for m in MUTATIONS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-o", "addopts=", *files]
    done = subprocess.run(command, cwd=ROOT, env=launch.environment(), capture_output=True, text=True, check=True)
    found = set(done.stdout.splitlines())
    found |= {line.partition("[")[0] for line in found}
    missing = sorted({m.test for m in MUTATIONS} - found)
    assert not missing, missing
