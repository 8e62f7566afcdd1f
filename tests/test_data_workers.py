"""Processes that read: the same batches and positions as a thread's, faults by name, nothing left behind."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tiny
import torch
from shard_samples import make_config, make_loader, make_model, make_sample, own_members, write_good, write_tar

from rcm_mcore.config import DataConfig, parse_config, parse_model
from rcm_mcore.data import DataStalled, ReaderDied, loader, merge_states
from rcm_mcore.data.workers import ReaderProcesses
from rcm_mcore.lab.videos import train
from rcm_mcore.training.setup import check

READERS = 8
SIZES = (3, 1, 2, 4, 2, 3, 1, 2, 5)  # samples per shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, first = tmp_path_factory.mktemp("shards"), 0
    for shard, size in enumerate(SIZES):
        write_good(folder / f"shard_{shard:06d}.tar", range(first, first + size))
        first += size
    return folder


def config_of(folder, **fields):
    return make_config(folder, readers=READERS, **fields)


def taken(data, steps):
    """What the next steps hold, and the positions after them."""
    return [(b.latents, b.text, b.prompts, b.keys, b.slots, b.step, b.state) for b in (next(data) for _ in range(steps))]


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def children():
    return psutil.Process().children(recursive=True)


def gone(pids, seconds=20):
    end = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(("workers", "rank", "size", "batch"), [(1, 0, 1, 4), (2, 0, 1, 3), (4, 1, 2, 6), (8, 0, 1, 5)])
def test_batches_are_those_of_a_thread(shards, workers, rank, size, batch):
    where = dict(rank=rank, size=size, batch=batch)
    with make_loader(config_of(shards), **where) as thread:
        want = taken(thread, 9)
    with make_loader(config_of(shards, workers=workers), **where) as data:
        got = taken(data, 9)
        assert len(children()) == workers
        last = got[-1][-1]
        assert data.state_dict() == last  # whatever has been prepared ahead
    assert_same(got, want)
    assert not children()


def test_given_frames_and_images_travel_too(tmp_path):
    tiny.make_shards(tmp_path)
    model = {**tiny.MODEL, "condition": "first_last", "image_len": 3, "image_dim": 6}
    batches = []
    for workers in (0, 2):
        config = DataConfig(shards=(f"{tmp_path}/*.tar",), latent_shape=tuple(tiny.LATENT), readers=4, workers=workers)
        with make_loader(config, model=parse_model(model)) as data:
            batches.append(next(data))
    assert batches[0].keys == batches[1].keys and batches[1].given.shape == batches[1].latents.shape
    assert torch.equal(batches[0].given, batches[1].given) and torch.equal(batches[0].image, batches[1].image)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (0, 2), (2, 0)])
def test_a_run_goes_on_with_other_processes(shards, before, after):
    with make_loader(config_of(shards)) as data:
        want = taken(data, 7)
    with make_loader(config_of(shards, workers=before)) as data:
        taken(data, 3)
        state = merge_states([data.state_dict()])
    with make_loader(config_of(shards, workers=after), start_step=3) as data:
        data.load_state_dict(state)
        assert_same(taken(data, 4), want[3:])


def test_bad_samples_are_logged_here_and_counted_together(tmp_path, caplog):
    for shard in range(4):
        good = [(f"{i:09d}", own_members(make_sample(i))) for i in range(3 * shard, 3 * shard + 3)]
        key, members = good[1]
        bad = key, {**members, "tensors.safetensors": b"no tensors"}
        write_tar(tmp_path / f"shard_{shard}.tar", [good[0], bad, good[2]])
    limits = {"readers": 2, "workers": 2, "prefetch": 1}
    with make_loader(make_config(tmp_path, **limits)) as data:
        assert not any(int(key) % 3 == 1 for _ in range(3) for key in next(data).keys)
        assert data.state_dict()["bad_samples"] == 6  # twelve of eight good ones an epoch
    assert sum(re.match(r"bad sample 0000000\d\d in .* skipped \(\d so far", line) is not None for line in caplog.messages) >= 6
    with (
        make_loader(make_config(tmp_path, max_bad_samples=3, **limits)) as data,
        pytest.raises(ValueError, match=r"data\.max_bad_samples=3: this rank has skipped 4"),
    ):
        taken(data, 3)
    assert not children()


def test_bad_samples_of_before_are_forgiven(shards):
    """As by a thread, which counts when it skips: a limit may be lowered, or fewer ranks go on with the counts of more."""
    with make_loader(config_of(shards)) as data:
        next(data)
        state = data.state_dict()
    state["readers"] = {v: [*position[:-1], 9] for v, position in state["readers"].items()}
    with make_loader(config_of(shards, workers=2, max_bad_samples=1), start_step=1) as data:
        data.load_state_dict(state)
        assert next(data).state["bad_samples"] == 9 * READERS


def test_what_a_process_refuses_is_refused_here(tmp_path, caplog):
    for shard in range(2):
        write_tar(tmp_path / f"shard_{shard}.tar", [("a", {"prompt.txt": b"alone"})])
    config = make_config(tmp_path, readers=2, workers=2)
    with (
        make_loader(config) as data,
        pytest.raises(ValueError, match=r"data\.shards: none of the 2 shards holds a good sample"),
    ):
        next(data)
    assert any("missing member tensors.safetensors" in line for line in caplog.messages), "and why"


def test_signals_are_the_training_s(shards):
    """From the first moment of a process on: a job's signals do not wait for its imports."""
    options = dict(model=make_model(), seed=7, dp_rank=0, dp_size=1, global_batch_size=4)
    with make_loader(config_of(shards)) as data:
        state = data.state_dict()
    processes = ReaderProcesses(config_of(shards, workers=2), **options, state=state)
    for pause in (0.0, 0.2, 1.5):
        time.sleep(pause)
        for child in children():
            child.send_signal(signal.SIGUSR1)
            child.send_signal(signal.SIGTERM)
    assert len(processes.read([0, 1, 2, 3]).keys) == 4
    processes.close()


def test_what_a_process_prints_does_not_reach_the_samples(shards, tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text("print('a banner')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with make_loader(config_of(shards, workers=1)) as data:
        assert next(data).step == 0
    assert "a banner" in capfd.readouterr().err


def test_a_process_that_dies_ends_the_run_by_name(shards):
    with make_loader(config_of(shards, workers=2, prefetch=1)) as data:
        next(data)
        victim = min(children(), key=lambda child: child.pid)
        victim.send_signal(signal.SIGTERM)  # as of a job that is to save and end: not theirs to act on
        assert next(data).step == 1
        victim.kill()
        with pytest.raises(ReaderDied, match=r"data\.workers: process [12] of 2, .* exit code -9 \(SIGKILL: out of memory"):
            for _ in range(500):  # what it had prepared is still there
                next(data)
    assert not children()


def test_a_shard_that_gives_nothing_is_named(tmp_path, caplog, monkeypatch):
    """A pipe in the place of a shard, into which nobody writes: opening it never returns."""
    monkeypatch.setattr(loader, "_WARN_SECONDS", 0.3)
    caplog.set_level(logging.WARNING)
    for shard in range(2):
        write_good(tmp_path / f"shard_{shard}.tar", range(3 * shard, 3 * shard + 3))
    with make_loader(make_config(tmp_path, readers=2, workers=2, prefetch=1, stall_minutes=0.2), batch=2) as data:
        next(data)
        for path in tmp_path.glob("*.tar"):
            path.unlink()
            os.mkfifo(path)  # the next epoch's
        with pytest.raises(DataStalled, match=rf"data\.shards: {tmp_path}/shard_\d\.tar has given no sample for 0\.2"):
            taken(data, 5000)  # what is in the pipes comes first
    assert any(re.match(rf"waiting for data: {tmp_path}/shard_\d\.tar has given", line) for line in caplog.messages)
    assert not children()


def test_processes_end_with_a_training_that_is_killed(shards, tmp_path):
    """Though both hang in a read."""
    for shard in shards.iterdir():
        shutil.copy(shard, tmp_path)
    script = (
        "import contextlib, os, signal, psutil; from test_data_workers import *; from pathlib import Path\n"
        f"data = make_loader(config_of({str(tmp_path)!r}, workers=2, stall_minutes=0.05)); next(data)\n"
        f"for path in Path({str(tmp_path)!r}).glob('*.tar'): path.unlink(), os.mkfifo(path)\n"
        "with contextlib.suppress(DataStalled): taken(data, 5000)\n"
        "print(*(child.pid for child in children()), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny.__file__).removesuffix("tiny.py"), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    pids = list(map(int, done.stdout.split()))
    assert done.returncode == -signal.SIGKILL and len(pids) == 2 and gone(pids)


def test_numbers_that_make_no_sense(shards):
    with pytest.raises(ValueError, match=r"data\.workers=3: data\.readers=8 is not divisible .* a multiple of 6"):
        make_loader(config_of(shards, workers=3), size=2)
    with pytest.raises(ValueError, match=r"data\.workers=-1"):
        parse_config(tiny.config("shards", "run", data={"workers": -1}))
    with pytest.raises(
        ValueError, match=r"data\.readers=4 must be a multiple of the data-parallel size 1 times data\.workers=3"
    ):
        check(parse_config(tiny.config("shards", "run", data={"workers": 3})), 1)


def test_a_training_is_the_same(tmp_path):
    tiny.make_shards(tmp_path / "shards")
    losses = []
    for workers in (0, 2):
        tree = tiny.config(tmp_path / "shards", tmp_path / f"run_{workers}", train={"steps": 3}, data={"workers": workers})
        train(tiny.write_config(tmp_path / f"{workers}.yaml", tree), [])
        losses.append([line["loss"] for line in tiny.log_lines(tmp_path / f"run_{workers}")])
    assert len(losses[0]) == 3 and np.array_equal(*losses)
