"""Break the code on purpose, one small change at a time, and demand that a test notices.

`python tests/mutate.py [-k SUBSTRING] [--list]` works on a copy of the repository, in which every mutation of mutations.py is
applied alone, its test is run against the copy and must fail. The tests must pass on the unchanged copy first. Exit status:
0 when every mutation was caught, 1 when one survived or could not be judged, 2 when the table or a test is wrong to begin with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH keeps a script's own folder off the path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"rcm_mcore": "rcm_mcore", "rcm_kernels": "kernels/rcm_kernels"}
PASSED, FAILED, WRONG_PACKAGE = 0, 1, 70  # the first two are pytest's

# Runs pytest in a fresh child for every line on stdin, [log file, arguments], and answers with its exit status. What is slow
# to import and never mutated is imported once, before the forks; our packages only in the children, and only from the copy:
# the installed ones are the originals.
SERVER = f"""
import json, os, sys
from importlib.util import find_spec
from pathlib import Path
import megatron.core.optimizer.distrib_optimizer, pytest, scipy.stats, torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel

def run(log, args):
    with open(log, "wb") as out, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0), os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    if not all(Path(find_spec(name).origin).resolve().is_relative_to(sys.argv[1]) for name in {list(PACKAGES)}):
        return {WRONG_PACKAGE}
    return pytest.main(args)

assert not any(name in sys.modules for name in {list(PACKAGES)})
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = {WRONG_PACKAGE}
        try:
            status = int(run(*json.loads(line)))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Copy:
    """The repository's files, tracked or new, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.links = (folder / "copy").resolve(), folder / "links"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():  # a deleted file is still listed
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        self.links.mkdir()
        for package, where in PACKAGES.items():
            (self.links / package).symlink_to(self.root / where)

    def mutated(self, mutation: Mutation) -> str:
        """The text of the file with the mutation; ValueError when it does not fit or is no Python."""
        text = (self.root / mutation.file).read_text()
        found = text.count(mutation.old)
        if found != 1 or mutation.old == mutation.new:
            raise ValueError(f"{mutation.file}: {mutation.old!r} must be found once and changed, found {found} times")
        text = text.replace(mutation.old, mutation.new)
        try:
            if mutation.file.endswith(".py"):
                compile(text, mutation.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"{mutation.file}: {mutation.new!r} is not valid here: {error}") from None
        return text

    @contextmanager
    def broken_by(self, mutation: Mutation) -> Iterator[None]:
        """The copy with one mutation, restored afterwards."""
        path = self.root / mutation.file
        original = path.read_text()
        path.write_text(self.mutated(mutation))
        try:
            yield
        finally:
            path.write_text(original)


class Pytest:
    """pytest on the packages of a copy."""

    def __init__(self, copy: Copy) -> None:
        self.copy, self.log = copy, copy.links.parent / "log"
        env = os.environ | {
            "PYTHONPATH": str(copy.links),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # a cached module of the same second and size would hide the next mutation
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",  # read when triton is imported, which the server does before tests/conftest.py
        }
        command = [sys.executable, "-W", "ignore", "-c", SERVER, str(copy.root)]
        self.server = subprocess.Popen(
            command, cwd=copy.root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )  # fmt: skip

    def __enter__(self) -> Pytest:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()  # the end of its input ends it

    def run(self, tests: Sequence[str]) -> tuple[int, str]:
        """Exit status and output of pytest on `tests` (node ids)."""
        args = ["-x", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={self.copy.root}", *tests]
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps([str(self.log), args]) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server died: see its output above"
        return int(answer), self.log.read_text()


def judge(pytest: Pytest, mutation: Mutation) -> str:
    """'caught', 'SURVIVED' or 'ERROR' (neither passed nor failed), printed with the first failure or the output."""
    start = time.monotonic()
    with pytest.copy.broken_by(mutation):
        status, output = pytest.run([mutation.test])
    verdict = {FAILED: "caught", PASSED: "SURVIVED"}.get(status, "ERROR")
    print(f"{verdict:8} {time.monotonic() - start:5.1f} s  {mutation}", flush=True)
    if verdict == "caught":
        print("".join(f"         {line}\n" for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))), end="")
    elif verdict == "ERROR":
        print(f"exit status {status}\n{output[-4000:]}")
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="SUBSTRING", default="", help="only mutations whose line in --list contains this")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if args.k in str(m)]
    if args.list:
        print("\n".join(map(str, chosen)))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy = Copy(Path(folder))
        wrong = [] if chosen else [f"no mutation contains {args.k!r}"]
        for mutation in chosen:
            try:
                copy.mutated(mutation)
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            print("\n".join(wrong))
            return 2
        tests = list(dict.fromkeys(m.test for m in chosen))
        with Pytest(copy) as pytest:
            print(f"{len(chosen)} mutations; first their {len(tests)} tests on unchanged code", flush=True)
            status, output = pytest.run(tests)
            if status != PASSED:
                print(f"these must pass before they can catch anything (exit status {status}):\n{output[-8000:]}")
                return 2
            verdicts = [judge(pytest, mutation) for mutation in chosen]
    caught = verdicts.count("caught")
    errors = f", {verdicts.count('ERROR')} not judged" if "ERROR" in verdicts else ""
    print(f"{caught} caught, {verdicts.count('SURVIVED')} survived{errors}")
    return 0 if caught == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
