"""What a run tells: lines where there is no terminal, and wandb, read back from its file, failing in every way."""

import json
import logging
import re
import resource
import struct
import threading
import time
from pathlib import Path

import pytest
import tiny
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from rcm_mcore.config import LogConfig
from rcm_mcore.training import console, wandb_run
from rcm_mcore.training.log import KEYS, RunLog
from rcm_mcore.training.wandb_run import name_of, without_key

API_KEY = "0123456789abcdef0123456789abcdef01234567"


def line(step, **values):
    """A step of a distillation that takes two seconds, every fifth, of the student, four."""
    student = step % 5 == 1
    of_phase = {"loss_scm": 1.5, "loss_dmd": 0.25, "g_norm": 7.5} if student else {"loss_critic": 0.125}
    line = {"step": step, "phase": "student" if student else "critic", "loss": step + 0.5, **of_phase, "lr": 1e-5}
    times = {"seconds": 4.0 if student else 2.0, "data_seconds": 0.36, "tokens_per_second": 120.0 if student else 240.0}
    return line | times | values


def run_log(folder, *, wandb=False, start=0, total=20, wandb_id=None, **resolved):
    """The log of rank 0."""
    config = LogConfig(wandb=wandb, project="tests")
    return RunLog(
        folder, config, is_main=True, start=start, total=total, cycle=5, resolved=resolved, wandb_id=wandb_id
    )  # fmt: skip


def test_the_guide_names_every_key():
    guide = (Path(__file__).parent.parent / "docs" / "monitoring.md").read_text()
    assert [key for key in KEYS if f"`{key}`" not in guide] == []


# Lines on stderr.


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start, which stand still unless a test moves them."""
    now = [0.0]
    start = time.mktime((2026, 11, 21, 18, 0, 0, 0, 0, -1))
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.time, "time", lambda: start + now[0])
    return now


def test_lines_come_every_thirty_seconds_and_for_the_first_and_last_step(tmp_path, clock, caplog, capsys):
    caplog.set_level(logging.INFO)
    log = run_log(tmp_path)
    for step in range(1, 21):
        clock[0] += line(step)["seconds"]
        log.write(line(step))
    log.close()
    # The first, at 4 s; from then on the first after 30 s have passed; the last.
    assert [int(re.match(r"step (\d+) of 20: ", text)[1]) for text in caplog.messages] == [1, 14, 20]
    assert "\r" not in capsys.readouterr().err  # no bar


def test_a_line_says_what_is_done_and_when_the_run_ends(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO)
    log = run_log(tmp_path, total=1000)
    for step in range(1, 7):
        clock[0] += line(step)["seconds"]
        log.write(line(step, memory_gib=61.25))
        if step == 2:
            log.stood_still(30.0)
    clock[0] += 1000.0
    log.write(line(7))
    # Of five steps, one of the student: 12 s. 993 steps of 2.4 s and a seventh of a save of 30 s: 6639 s from 18:16:58 on.
    assert caplog.messages[-1] == (
        "step 7 of 1000: critic, loss 7.5; 2.4 s a step, ends Sat 2026-11-21 20:07, 200 tokens/s, 15% waiting for data"
    )
    assert caplog.messages[0].startswith("step 1 of 1000: student, loss 1.5, g_norm 7.5; 4 s a step, ends ")
    assert caplog.messages[0].endswith(", 120 tokens/s, 9% waiting for data, 61.2 GiB")


def test_a_terminal_has_a_bar(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True, raising=False)
    log = run_log(tmp_path)
    log.write(line(1))
    log.close()
    assert "1/20" in capsys.readouterr().err and caplog.messages == []


def test_a_save_is_in_the_next_line_alone(tmp_path):
    log = run_log(tmp_path)
    log.write(line(1))
    log.stood_still(2.5)
    log.write(line(2))
    log.write(line(3))
    log.close()
    lines = tiny.log_lines(tmp_path)
    assert [x["save_seconds"] for x in lines] == [None, 2.5, None] and all(tuple(x) == KEYS for x in lines)


def test_a_full_disk_loses_no_line(tmp_path, caplog):
    """And ends nothing: what could not be written comes with the next line."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = run_log(tmp_path)
    log.write(line(1))
    for step, room in ((2, 10), (3, 0)):  # part of a line fits, then nothing
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + room, limits[1]))
        try:
            log.write(line(step))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(tiny.log_lines(tmp_path)) == 1
    log.write(line(4))
    log.close()
    assert [x["step"] for x in tiny.log_lines(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("cannot be written now") == 1


# wandb.


def records(path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 kB, after wandb's own head of seven bytes."""
    data, at, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


def offline_runs(folder):
    """Config and history of the runs that wandb wrote to `folder`, by their id: values by name, for each step."""
    runs = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        config, history = runs.setdefault(path.stem.removeprefix("run-"), ({}, {}))
        for record in records(path):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                names = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                history[record.history.step.num] = {k: v for k, v in names.items() if not k.startswith("_")}
    return runs


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb_homes" / kind.lower()))
    yield
    wandb.teardown()


def test_wandb_has_the_values_of_the_lines(tmp_path, offline):
    log = run_log(tmp_path, wandb=True, train={"steps": 20})
    for step in range(1, 8):
        log.write(line(step))
        if step == 3:
            log.stood_still(0.25)
    log.close()
    again = run_log(tmp_path, wandb=True, start=7, wandb_id=log.wandb_id)
    again.write(line(8))
    again.close()
    wandb.teardown()  # its process closes files after `finish` has returned

    ((found, (config, history)),) = offline_runs(tmp_path).items()
    assert found == log.wandb_id == again.wandb_id and config["train"] == {"steps": 20}
    lines = tiny.log_lines(tmp_path)
    assert sorted(history) == [x["step"] for x in lines] == list(range(1, 9))
    for x in lines:
        wanted = {name_of(key): value for key, value in x.items() if value is not None and key != "step"}
        assert history[x["step"]] == wanted
    assert history[1]["loss/scm"] == 1.5 and history[1]["norm/tangent"] == 7.5 and history[1]["time/step"] == 4.0
    assert history[4]["time/save"] == 0.25 and "loss/scm" not in history[4]
    names = [name_of(key) for key in KEYS if key != "step"]
    assert len(set(names)) == len(names) and all(name.count("/") == 1 for name in names)
    # What was written is found by a search for bytes, and the key of the account is nowhere.
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"norm/tangent" in data for data in files)
    assert not any(API_KEY.encode() in data for data in files)


class Run:
    """A run of wandb that fails, or hangs, where it is told to."""

    def __init__(self, fails=(), hangs=()):
        self.fails, self.hangs, self.logged, self.options, self.let_go = fails, hangs, [], {}, threading.Event()

    def _at(self, place):
        if place in self.hangs:
            self.let_go.wait(60)
        if place in self.fails:
            raise wandb.errors.CommError(f"no way ({API_KEY})\nand more of {place}")

    def init(self, **options):
        self.options = options
        self._at("init")
        return self

    def log(self, values, step):
        self.logged.append(step)
        if step == 3:
            self._at("log")

    def finish(self):
        self._at("finish")


LOGGED = {"init": [], "log": [1, 2, 3], "finish": [1, 2, 3, 4, 5]}  # where it fails: the steps that wandb has seen by then


@pytest.mark.parametrize("how, place", [(how, place) for how in ("fails", "hangs") for place in LOGGED])
def test_a_run_goes_on_without_wandb(tmp_path, monkeypatch, caplog, how, place):
    run = Run(**{how: [place]})
    monkeypatch.setattr(wandb, "init", run.init)
    monkeypatch.setattr(wandb_run, "SECONDS", 0.3)
    monkeypatch.setattr(wandb_run, "_MARGIN", 0.2)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    log = run_log(tmp_path, wandb=True, train={"steps": 5})
    for step in range(1, 6):
        log.write(line(step))
    log.close()  # waits for half a second, not for what hangs
    assert run.logged == LOGGED[place]
    run.let_go.set()
    assert [x["step"] for x in tiny.log_lines(tmp_path)] == [1, 2, 3, 4, 5]
    (event,) = tiny.events(tmp_path)
    want = {"fails": "CommError: no way (WANDB_API_KEY)", "hangs": "wandb has not ended within 0 s"}[how]
    assert (event["event"], event["error"]) == ("wandb_failed", want)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [f"the run goes on without wandb: {want}"]
    assert API_KEY not in caplog.text and API_KEY not in str(run.options)
    assert run.options["settings"].init_timeout == 0.3 and run.options["settings"].finish_timeout == 0.3


def test_lines_that_wandb_does_not_take_do_not_pile_up(tmp_path, monkeypatch):
    run = Run(hangs=["init"])
    monkeypatch.setattr(wandb, "init", run.init)
    monkeypatch.setattr(wandb_run, "_MAX_LINES", 3)
    log = run_log(tmp_path, wandb=True)
    for step in range(1, 8):
        log.write(line(step))
    assert [event["error"] for event in tiny.events(tmp_path)] == ["wandb is 3 lines behind"]
    run.let_go.set()
    log.close()
    assert len(tiny.events(tmp_path)) == 1


@pytest.mark.parametrize("key, text", [(API_KEY, f"a {API_KEY}"), (API_KEY, f" a {API_KEY}\nb"), ("", "a WANDB_API_KEY\nb")])
def test_an_error_has_one_line_without_the_key(monkeypatch, key, text):
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert without_key(text) == "a WANDB_API_KEY"
