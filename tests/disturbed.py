"""Runs that are disturbed on purpose, seen from outside: their processes, logs, checkpoints, and the samples that they took."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import launch

from rcm_mcore.checkpoint.folder import check_files

EVERY = 3  # steps between checkpoints
PATIENCE = 900.0  # seconds for anything to happen on a busy machine


def until(condition, what, alive=lambda: True):
    """The first true value of `condition`."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert alive(), f"the run ended before {what}"
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s until {what}"
        time.sleep(0.002)
    return value


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def started(command, output, **environment):
    """A process whose output goes to a file; ended with its children if it is still there."""
    # torchrun lends workers that it starts again the store of those before them, who left their addresses in it
    # (pytorch issue 135712); told so, it lets the workers make a store of their own.
    env = launch.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environment)
    with output.open("a") as stream:
        run = subprocess.Popen(command, env=env, stdout=stream, stderr=stream)
        try:
            yield run
        finally:
            if run.poll() is None:
                run.terminate()  # torchrun ends its workers
                try:
                    run.wait(60)
                except subprocess.TimeoutExpired:
                    run.kill()


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


class Checkpoints:
    """The checkpoints of a run, watched: once there is one, there is always a whole one, none older than the last."""

    def __init__(self, folder):
        self.folder, self.newest, self.looks, self.problems = folder, 0, 0, []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def steps(self):
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*"))

    def saving(self):
        """Saves that are going on or were cut short: names, with the time of the last change, which tells an old one."""
        found = set()
        for path in self.folder.glob(".partial_step_*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    def look(self, check):
        """Whether the newest is whole by `check`, a function of its folder that raises ValueError or OSError."""
        steps = self.steps()
        newest = steps[-1] if steps else 0
        if newest < self.newest:
            self.problems.append(f"the newest checkpoint went from step {self.newest} back to {newest}")
        self.newest, self.looks = max(self.newest, newest), self.looks + 1
        if newest:
            try:
                check(self.folder / f"step_{newest:09d}")
            except (ValueError, OSError) as error:
                self.problems.append(f"step {newest}: {error}")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def _watch(self):
        while not self._end.wait(0.02):
            self.look(sizes_agree)


def sizes_agree(path):
    for name, (size, _) in json.loads((path / "manifest.json").read_text()).items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has another size")


class Disturbed:
    """A run of two ranks under torchrun of which a rank is killed at chosen moments.

    kills: of each the moment aimed at, rank, step that the log had reached, whether a save was cut short, wall time.
    """

    def __init__(self, place, name, run, rng):
        self.place, self.run, self.rng, self.name = place, run, rng, name
        self.folder, self.kills = place / name, []
        self.checkpoints = Checkpoints(self.folder)

    def alive(self):
        return self.run.poll() is None

    def _until(self, condition, what):
        def checked():
            attempt = max(read_json(self.place / f"rank_{rank}.json").get("attempt", -1) for rank in range(2))
            assert attempt <= len(self.kills), f"attempt {attempt} after {len(self.kills)} kills, waiting until {what}"
            return condition()

        return until(checked, what, self.alive)

    def ranks(self):
        """Both ranks of this attempt, once they are there."""

        def there():
            found = [read_json(self.place / f"rank_{rank}.json") for rank in range(2)]
            attempts = [facts.get("attempt", -1) for facts in found]
            return found if attempts == [len(self.kills)] * 2 else None

        return self._until(there, f"attempt {len(self.kills)} began")

    def kill(self, moment):
        """Kill a random rank: during its "start", in a "step", or in a "save" that follows one that this attempt finished."""
        ranks, rank, left = self.ranks(), self.rng.randrange(2), self.checkpoints.saving()
        if moment == "start":
            time.sleep(self.rng.uniform(0.0, 10.0))
        else:
            self._until(lambda: self._taken(0) == len(self.kills), "it went on")
            first, saved = logged(self.folder), self.checkpoints.steps()
            if moment == "save":
                self._until(lambda: self.checkpoints.steps() > saved, "it saved")
                self._until(lambda: self.checkpoints.saving() - left, "it saved again")
                time.sleep(self.rng.uniform(0.0, 0.1))
            else:
                wanted = first + self.rng.randint(EVERY, 2 * EVERY)
                self._until(lambda: logged(self.folder) >= wanted, f"step {wanted}")
                time.sleep(self.rng.uniform(0.0, 0.1))
        saving, step = self.checkpoints.saving() - left, logged(self.folder)
        os.kill(ranks[rank]["pid"], signal.SIGKILL)
        now = time.time()
        cut = bool({name for name, _ in saving} & {name for name, _ in self.checkpoints.saving()})
        self.checkpoints.look(check_files)
        newest = self.checkpoints.newest
        self.kills.append({"moment": moment, "rank": rank, "step": step, "save": cut, "newest": newest, "time": now})

    def _taken(self, rank):
        """The last attempt in which a rank took samples."""
        try:
            return json.loads((self.place / f"keys_{self.name}_{rank}.jsonl").read_text().splitlines()[-1])["attempt"]
        except (OSError, IndexError):
            return -1

    def recoveries(self):
        """Seconds from each kill until the run went on."""
        times = [event["time"] for event in events(self.folder) if event["event"] in ("started", "resumed")]
        return [min(t for t in times if t > kill["time"]) - kill["time"] for kill in self.kills]


def logged(folder):
    """The last step in the log of a run."""
    try:
        return max((json.loads(line)["step"] for line in (folder / "log.jsonl").read_bytes().splitlines()), default=0)
    except (OSError, ValueError):
        return 0


def events(folder):
    try:
        return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def taken(place, name, ranks):
    """What each rank took, in order: lists of {"attempt", "step", "slots", "keys"}."""
    paths = [place / f"keys_{name}_{rank}.jsonl" for rank in ranks]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def by_place(lines):
    """{(step, slot): key} of a run; a place that was taken again, after a kill, must get the same sample."""
    found = {}
    for line in lines:
        for slot, key in zip(line["slots"], line["keys"], strict=True):
            assert found.setdefault((line["step"], slot), key) == key, f"step {line['step']}, slot {slot}: {key}"
    return found
