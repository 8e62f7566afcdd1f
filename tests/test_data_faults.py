"""Shards that go away, are cut, or stall while a run reads them."""

import contextlib
import errno
import io
import json
import logging
import os
import re
import threading
import time
from types import SimpleNamespace

import launch
import pytest
import tiny
from shard_samples import SEED, make_config, make_loader, write_good
from test_shards import member_offsets

from rcm_mcore.config import parse_config
from rcm_mcore.data import DataStalled, deal_shards, loader, readers, shards

SHARDS, SIZE = 6, 3  # shards, samples in each
DEAL = [shard for epoch in range(4) for shard in deal_shards(SHARDS, readers=1, reader=0, seed=SEED, epoch=epoch)]


@pytest.fixture
def folder(tmp_path):
    for shard in range(SHARDS):
        write_good(tmp_path / f"shard_{shard:06d}.tar", range(SIZE * shard, SIZE * (shard + 1)))
    return tmp_path


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    assert readers._PAUSES == (0.1, 1.0, 5.0)
    monkeypatch.setattr(readers, "_PAUSES", (0.001, 0.002, 0.003))


def path_of(folder, shard):
    return folder / f"shard_{shard:06d}.tar"


def keys_of(*shards, skip=()):
    """Keys in the order of the shards, without those of samples that are skipped."""
    samples = [SIZE * shard + i for shard in shards for i in range(SIZE)]
    return [f"{sample:09d}" for sample in samples if sample not in skip]


def one_reader(folder, **fields):
    return make_config(folder, readers=1, prefetch=1, **fields)


def read(data, number):
    return [next(data).keys[0] for _ in range(number)]


class Faulty(io.FileIO):
    """A file of which some reads fail, or are slow. `fault` is called before each with the name and the offset."""

    def __init__(self, path, fault):
        super().__init__(path, "rb")
        self.fault = fault

    def readinto(self, buffer):
        self.fault(self.name, self.tell())
        return super().readinto(buffer)


@contextlib.contextmanager
def faults(monkeypatch, *, opening=lambda path: None, reading=lambda path, offset: None):
    """Shards are opened and read through functions that may raise or wait."""

    def faulty_open(path, mode):
        opening(path)
        return io.BufferedReader(Faulty(path, reading), 512)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "open", faulty_open, raising=False)
        yield


def failing(path, times, error, where=lambda offset: True):
    """A fault that hits reads (or, of one argument, the opening) of a path so many times; and how often it did."""
    hits = []

    def fail(name, offset=0):
        if os.fspath(name) == os.fspath(path) and where(offset) and len(hits) < times:
            hits.append(offset)
            raise OSError(error, os.strerror(error), os.fspath(path))

    return fail, hits


GONE = {"deleted": errno.ENOENT, "no right": errno.EACCES, "stale": errno.ESTALE, "broken": errno.EIO}


@pytest.mark.parametrize("how", GONE)
def test_a_shard_that_cannot_be_read_is_skipped_counted_once_and_named(folder, monkeypatch, caplog, how):
    path = path_of(folder, DEAL[1])
    if how == "deleted":
        fail = lambda name, offset=0: None
    else:
        fail, _ = failing(path, 10**6, GONE[how])
    opening, reading = ((fail, lambda *_: None), (lambda *_: None, fail))[how == "broken"]
    with faults(monkeypatch, opening=opening, reading=reading), make_loader(one_reader(folder), batch=1) as data:
        if how == "deleted":
            path.unlink()
        first = read(data, 2 * SIZE)
        assert first == keys_of(DEAL[0], DEAL[2])
        state = json.loads(json.dumps(data.state_dict()))
        assert state["readers"]["0"] == [0, 2, SIZE, 1]
        rest = read(data, 3 * SIZE)
        assert rest == keys_of(*DEAL[3:6])
    tries = [line for line in caplog.messages if "cannot be read: " in line]
    assert len(tries) == 3 and all(str(path) in line and os.strerror(GONE[how]) in line for line in tries)
    (skipped,) = [line for line in caplog.messages if "skipped" in line]
    assert skipped.startswith(f"bad sample (rest of the shard) in {path} skipped (1 so far, data.max_bad_samples=100): ")
    assert f"tried 4 times: [Errno {GONE[how]}]" in skipped


@pytest.mark.parametrize("cut", [1, SIZE, SIZE + 1, 2 * SIZE])
def test_resuming_around_a_shard_that_is_gone_is_exact(folder, cut):
    """With an empty file in its place; without one the names are others, and so would the order be."""
    gone = DEAL[1]
    with make_loader(one_reader(folder), batch=1) as data:
        path_of(folder, gone).unlink()
        read(data, cut)
        state = json.loads(json.dumps(data.state_dict()))
        rest, last = read(data, 20), data.state_dict()
    with pytest.raises(ValueError, match=r"data\.shards: .* differ .* an empty file of its name is skipped as a damaged one"):
        make_loader(one_reader(folder), batch=1).load_state_dict(state)
    path_of(folder, gone).touch()
    with make_loader(one_reader(folder), batch=1, start_step=cut) as data:
        data.load_state_dict(state)
        assert read(data, 20) == rest and data.state_dict() == last


def test_more_than_data_max_bad_samples_end_the_run_by_name(folder):
    with make_loader(one_reader(folder, max_bad_samples=1), batch=1) as data:
        for shard in (DEAL[1], DEAL[3]):
            path_of(folder, shard).unlink()
        assert read(data, 2 * SIZE) == keys_of(DEAL[0], DEAL[2])
        words = rf"data\.max_bad_samples=1: .* skipped 2, .*{path_of(folder, DEAL[3]).name}: cannot be read.* No such file"
        with pytest.raises(ValueError, match=words):
            next(data)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("where", ["opening", "first header", "header", "payload", "end"])
def test_a_hiccup_changes_nothing(folder, monkeypatch, caplog, times, where):
    path = path_of(folder, DEAL[1])
    offsets = member_offsets(path)
    size = path.stat().st_size
    (start, end) = {
        "opening": (0, size),
        "first header": (0, 512),
        "header": (offsets[3][0], offsets[3][0] + 512),  # of the second sample
        "payload": (offsets[3][1], offsets[3][1] + 512),  # and not what tarfile looks at on the way to the next header
        "end": (offsets[-1][1] + 512, size),
    }[where]
    fail, hits = failing(path, times, errno.EIO, lambda offset: start <= offset < end)
    target = {"opening" if where == "opening" else "reading": fail}
    caplog.set_level(logging.WARNING)
    with faults(monkeypatch, **target), make_loader(one_reader(folder), batch=1) as data:
        assert read(data, SHARDS * SIZE) == keys_of(*DEAL[:SHARDS])
        assert data.state_dict()["bad_samples"] == 0 and len(hits) == times
    assert [line.rpartition("; ")[2] for line in caplog.messages] == [
        f"try {n + 2} comes in {pause:g} s" for n, pause in enumerate(readers._PAUSES[:times])
    ]


@pytest.mark.parametrize("member, within", [(3, 512), (4, 3), (6, 3), (6, 0), (7, 100)])
def test_a_shard_that_is_cut_while_it_is_open_loses_its_rest(folder, caplog, member, within):
    """After its first sample was read, and with it the header of the second: in payloads and in headers of the next two."""
    path = path_of(folder, DEAL[0])
    with make_loader(one_reader(folder), batch=1) as data:
        data._readers.read(0)  # not by the thread, which would be ahead
        os.truncate(path, member_offsets(path)[member][0] + within)
        found = [data._readers.read(k).key for k in range(1, 5)]
        state = data._readers.state()
    whole = 1 if member >= 7 else 0  # samples after the first, known to be whole by the header that follows them
    assert found == (keys_of(DEAL[0])[1 : 1 + whole] + keys_of(*DEAL[1:3]))[:4]
    assert state["bad_samples"] == 1 and f"(rest of the shard) in {path} skipped" in caplog.text


def test_a_shard_that_is_cut_in_the_middle_of_a_read_loses_its_rest(folder, monkeypatch, caplog):
    """Within the payload of its second sample, known to be whole until then."""
    path = path_of(folder, DEAL[0])
    start, size = member_offsets(path)[3][1], path.stat().st_size

    def cut(name, offset):
        if os.fspath(name) == os.fspath(path) and start <= offset < start + 512 and path.stat().st_size == size:
            os.truncate(path, start + 3)

    with faults(monkeypatch, reading=cut), make_loader(one_reader(folder), batch=1) as data:
        assert read(data, SIZE + 1) == keys_of(DEAL[0])[:1] + keys_of(DEAL[1])
        assert data.state_dict()["bad_samples"] == 1
    assert f"(rest of the shard) in {path} skipped" in caplog.text and "unexpected end of data in " in caplog.text


def test_a_slow_shard_is_waited_for_and_named(folder, monkeypatch, caplog):
    monkeypatch.setattr(loader, "_WARN_SECONDS", 0.05)
    path = path_of(folder, DEAL[1])
    naps = [0.4]

    def slow(name, offset):
        if os.fspath(name) == os.fspath(path) and naps:
            time.sleep(naps.pop())

    caplog.set_level(logging.WARNING)
    with faults(monkeypatch, reading=slow), make_loader(one_reader(folder), batch=1) as data:
        assert read(data, SHARDS * SIZE) == keys_of(*DEAL[:SHARDS]) and not naps
        assert data.state_dict()["bad_samples"] == 0
    assert any(re.fullmatch(rf"waiting for data: {path} has given no sample for \d s", line) for line in caplog.messages)


def test_many_slow_samples_are_no_stall(folder, monkeypatch):
    """The limit is of one sample, not of a batch: by a clock of ours each shard's first takes nine tenths of it."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)

    def slow(path):
        now[0] += 0.9 * 60
        time.sleep(0.2)  # the consumer looks in the meantime

    for module in (loader, readers):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(loader, "_WARN_SECONDS", 0.05)
    with faults(monkeypatch, opening=slow), make_loader(one_reader(folder, stall_minutes=1), batch=SHARDS * SIZE) as data:
        assert list(next(data).keys) == keys_of(*DEAL[:SHARDS])


def test_a_shard_that_gives_nothing_ends_the_run(folder, caplog, monkeypatch):
    """A pipe in the place of a shard, into which nobody writes: opening it never returns."""
    monkeypatch.setattr(loader, "_JOIN_SECONDS", 0.2)
    path = path_of(folder, DEAL[1])
    data = make_loader(one_reader(folder, stall_minutes=1 / 30), batch=1)
    path.unlink()
    os.mkfifo(path)
    try:
        with data:
            assert read(data, SIZE) == keys_of(DEAL[0])
            with pytest.raises(DataStalled, match=rf"data\.shards: {path} has given no sample for 0\.03\d+ minutes") as error:
                next(data)
            for words in ("data.stall_minutes=0.0333333", "file system", "data.prefetch"):
                assert words in str(error.value)
        assert sum("waiting for data: " in line for line in caplog.messages) > 3
        assert f"the thread that reads {path} does not end and is left behind" in caplog.messages[-1]
        assert any(thread.name == "data-loader" and thread.daemon for thread in threading.enumerate())
    finally:
        end = time.monotonic() + 10
        while data._thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(OSError):  # nobody is at the pipe just now
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # lets the thread go
            time.sleep(0.01)
    assert not data._thread.is_alive()


def test_a_rank_whose_shard_stalls_ends_the_run(tmp_path):
    """Of two under torchrun, the other in a collective: one line, exit code 1, and torchrun returns, so no process is left."""
    tiny.make_shards(tmp_path / "shards")
    tree = tiny.config(
        tmp_path / "shards", tmp_path / "run", train={"steps": 40}, checkpoint={"every": 2}, data={"stall_minutes": 0.1}
    )
    tiny.write_config(tmp_path / "run.yaml", tree)
    done = launch.torchrun(2, launch.HERE / "ranks_stalled.py", tmp_path, check=False, timeout=300)
    assert done.returncode == 1
    code = tmp_path / "code_1"  # not there if torchrun, told by rank 0 that its peer is gone, was quicker to end rank 1
    assert not code.exists() or code.read_text() == "1", done.stderr[-6000:]
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "error: rank 1: " in line]
    assert len(lines) == 1 and re.search(r"data\.shards: .*/shard_\d+\.tar has given no sample for .* minutes", lines[0])
    assert re.search(r"WARNING rank 1: waiting for data: .*/shard_\d+\.tar", done.stderr)
    assert [line["step"] for line in tiny.log_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "latest").read_text() == "step_000000004"


def test_a_limit_that_is_none_is_refused():
    for value in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"data\.stall_minutes=.*: must be positive"):
            parse_config(tiny.config("shards", "run", data={"stall_minutes": value}))
