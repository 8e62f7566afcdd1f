"""Pieces of tensors in checkpoints, saves behind the training, and the lock of a run's folder."""

import math
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from rcm_mcore.checkpoint import CheckpointError, CheckpointFolder, read_network
from rcm_mcore.config import parse_config
from rcm_mcore.interop import dcp
from rcm_mcore.interop.dcp import Pieces, boxes_of_range, read_pieces, write_index, write_share
from rcm_mcore.models import build_model
from rcm_mcore.training import saver as module
from rcm_mcore.training.locked_memory import forget_cuda_error
from rcm_mcore.training.networks import make_trained
from rcm_mcore.training.saver import Saver
from rcm_mcore.training.setup import check_output, host_memory
from rcm_mcore.training.state import RunState


def cut(full, borders):
    """Consecutive ranges of a tensor's elements, each as the pieces that it is made of."""
    found = []
    for start, stop in pairwise(borders):
        flat, parts = full.reshape(-1)[start:stop], []
        boxes = list(boxes_of_range(tuple(full.shape), start, stop))
        for (offset, shape), part in zip(boxes, flat.split([math.prod(s) for _, s in boxes])):
            parts.append((offset, part.view(shape)))
        found.append(Pieces(full.shape, tuple(parts)))
    return found


@pytest.mark.parametrize("shape", [(), (7,), (1,), (3, 5), (1, 6), (6, 1), (4, 3, 5), (2, 1, 3, 2), (3, 2, 2, 2, 2)])
def test_a_range_is_made_of_few_boxes(shape):
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            boxes = list(boxes_of_range(shape, start, stop))
            found = [numbers[tuple(slice(o, o + n) for o, n in zip(*box))].reshape(-1) for box in boxes]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1) and all(size > 0 for _, box in boxes for size in box)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_number_of_ranks_wrote_another_reads(tmp_path, dtype):
    generator = random.Random(0)
    full = {
        f"{name}.w": torch.randn(shape).to(dtype) for name, shape in {"a": (9, 4), "b": (5, 3, 2), "c": (), "d": (11,)}.items()
    }

    def dealt(ranks):
        shares = [{} for _ in range(ranks)]
        for key, tensor in full.items():
            inner = sorted(generator.randrange(tensor.numel() + 1) for _ in range(ranks - 1))
            for share, pieces in zip(shares, cut(tensor, [0, *inner, tensor.numel()])):
                share[key] = pieces
        return shares

    write_index(tmp_path, [write_share(tmp_path, f"__{i}_0.distcp", share.items()) for i, share in enumerate(dealt(3))])
    for share in dealt(4):
        wanted = {
            key: pieces.map(lambda part: torch.full_like(part, math.nan, dtype=torch.float32)) for key, pieces in share.items()
        }
        read_pieces(tmp_path, wanted)
        for key, pieces in share.items():
            for (_, want), (_, got) in zip(pieces.parts, wanted[key].parts, strict=True):
                assert torch.equal(got, want.float())


def test_megatron_reads_it(tmp_path, mesh):
    full = torch.randn(6, 5)
    shares = [write_share(tmp_path, f"__{i}_0.distcp", [("net.w", p)]) for i, p in enumerate(cut(full, [0, 7, 13, 30]))]
    write_index(tmp_path, shares)
    wanted = ShardedTensor.from_rank_offsets("net.w", torch.zeros(3, 5), (0, 1, 2))  # the second half of two
    assert torch.equal(dist_checkpointing.load({"w": wanted}, str(tmp_path), validate_access_integrity=False)["w"], full[3:])


def test_what_does_not_fit_changes_nothing(tmp_path):
    full = torch.randn(4, 3)
    write_index(tmp_path, [write_share(tmp_path, "__0_0.distcp", [("w", cut(full, [0, 12])[0])])])
    place = torch.zeros(2, 3)
    for wanted, message in (
        ({"w": Pieces(torch.Size((2, 3)), (((0, 0), place),))}, r"w is \[4, 3\], not \[2, 3\]"),
        ({"w": Pieces(full.shape, (((2, 0), place),)), "v": Pieces(full.shape, ())}, "does not hold v"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pieces(tmp_path, wanted)
    assert not place.any()
    half = write_share(tmp_path, "__0_0.distcp", [("w", cut(full, [0, 11, 12])[0])])
    with pytest.raises(ValueError, match=r"the parts of w do not make up its \[4, 3\]"):
        write_index(tmp_path, [half])


CONFIG = tiny.config("shards", "run", train={"steps": 9})


@pytest.fixture
def saving(tmp_path, mesh):
    """A function that makes a Saver of one small network: (saver, network, folder, events)."""
    made = []

    def make(**checkpoint):
        config = parse_config(CONFIG | {"checkpoint": {"dir": str(tmp_path / "run"), "every": 1, **checkpoint}})
        net = build_model(config.model, config.mesh, mesh.groups, seed=1)
        one = make_trained("student", net, config, mesh, peak_lr=1e-2, total_steps=9, has_ema=True)
        folder, events = CheckpointFolder(tmp_path / "run"), []
        folder.make()
        saver = Saver(
            folder, [one], config=config, mesh=mesh, report=lambda kind, **facts: events.append({"event": kind, **facts})
        )
        made.append((saver, folder))
        return saver, net, folder, events

    yield make
    for saver, folder in made:
        saver.close()
        folder.unlock()


def state(step):
    return RunState(step=step, own_steps={"student": step}, data={})


def weights(folder, step):
    return read_network(folder.path(step))[0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_holds_the_state_of_its_step(saving, asynchronous, monkeypatch):
    """Though training changes the weights before a byte of it is written."""
    saver, net, folder, events = saving(asynchronous=asynchronous)
    may_write = threading.Event()
    if asynchronous:
        write = module.save_state
        monkeypatch.setattr(module, "save_state", lambda *args: (may_write.wait(60), write(*args)))
    before = {name: p.detach().cpu().clone() for name, p in net.named_parameters()}
    saver.save(state(1))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    saver.note_finished()
    assert folder.steps() == ([] if asynchronous else [1])  # training goes on meanwhile
    assert [e["event"] for e in events] == ([] if asynchronous else ["saved"])
    may_write.set()
    saver.settle()
    stored = weights(folder, 1)
    assert stored.keys() == before.keys() and all(torch.equal(stored[name], before[name]) for name in before)
    (event,) = events
    assert (event["event"], event["saved_step"]) == ("saved", 1) and event["gib"] > 0
    assert event["stalled_seconds"] > 0 and event["seconds"] > 0


def test_a_save_waits_for_the_one_before(saving, monkeypatch, caplog):
    saver, net, folder, events = saving(keep_last=9)
    write, writing = module.save_state, []

    def slow(folder, pieces, state, config):
        writing.append(state.step)
        assert len(writing) == 1, "two at a time"
        time.sleep(0.2)
        write(folder, pieces, state, config)
        writing.clear()

    monkeypatch.setattr(module, "save_state", slow)
    for step in (1, 2, 3):
        with torch.no_grad():
            net.head.head.bias.fill_(step)
        saver.save(state(step))
    saver.settle(last=True)
    assert [float(weights(folder, step)["head.head.bias"][0]) for step in (1, 2, 3)] == [1, 2, 3]
    assert [e["saved_step"] for e in events] == [1, 2, 3]
    assert "raise checkpoint.every=1" in caplog.text


def test_a_checkpoint_is_whole(saving):
    """What the manifest says of files whose CRC-32 was found while they were written."""
    saver, _, folder, _ = saving()
    saver.save(state(1))
    saver.settle(last=True)
    assert folder.newest() == folder.path(1)
    assert "__0_0.distcp" in (folder.path(1) / "manifest.json").read_text()


def test_a_full_disk_is_called_so(tmp_path):
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_share(tmp_path, "__0_0.distcp", [("w", cut(torch.zeros(1 << 20), [0, 1 << 20])[0])])


def fails(*steps):
    """A writer for which the disk is full at some steps."""
    write = module.save_state

    def save(folder, pieces, state, config):
        if state.step not in steps:
            return write(folder, pieces, state, config)
        folder.save(
            state.step, lambda path: (path / "w").symlink_to("/dev/full") or (path / "w").write_bytes(b"0" * 9000), keep_last=2
        )

    return save


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_failed_save_is_forgiven_and_two_are_not(saving, monkeypatch, asynchronous, caplog):
    saver, _, folder, events = saving(asynchronous=asynchronous, keep_last=9)
    monkeypatch.setattr(module, "save_state", fails(2, 4, 5))
    for step in (1, 2, 3, 4, 5):
        saver.save(state(step))
    while not saver.has_failed:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"step 5 could not be written.*step 3 is untouched.*No space left on device"):
        saver.settle()
    assert [(e["event"], e["saved_step"]) for e in events] == [
        ("saved", 1), ("save_failed", 2), ("saved", 3), ("save_failed", 4), ("save_failed", 5),
    ]  # fmt: skip
    assert "The run goes on, and ends if the next save fails too" in caplog.text
    assert folder.newest() == folder.path(3) and not list(folder.root.glob(".partial*"))


def test_the_last_save_must_succeed(saving, monkeypatch):
    saver, *_ = saving()
    monkeypatch.setattr(module, "save_state", fails(1))
    saver.save(state(1))
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        saver.settle(last=True)


def test_an_unexpected_error_of_the_writer_is_not_lost(saving, monkeypatch):
    saver, *_ = saving()
    monkeypatch.setattr(module, "save_state", lambda *args: 1 / 0)
    saver.save(state(1))
    with pytest.raises(CheckpointError, match=r"step 1 was given up: ZeroDivisionError"):
        saver.settle(last=True)


def test_what_keep_every_divides_stays(saving):
    saver, _, folder, _ = saving(keep_last=2, keep_every=3)
    for step in range(1, 9):
        saver.save(state(step))
    saver.settle(last=True)
    assert folder.steps() == [3, 6, 7, 8]


@pytest.mark.parametrize("every, keep_every", [(2, 3), (2, 1), (1, 0), (1, -1)])
def test_keep_every_must_be_a_multiple_of_every(every, keep_every):
    with pytest.raises(
        ValueError, match=rf"checkpoint.keep_every={keep_every}: must be a multiple of checkpoint.every={every}"
    ):
        parse_config(CONFIG | {"checkpoint": {"dir": "run", "every": every, "keep_every": keep_every}})


def test_what_cannot_be_removed_does_not_fail_a_save(saving, monkeypatch, caplog):
    """A file that another process has open keeps its folder, on NFS."""
    saver, _, folder, events = saving(keep_last=1)
    remove, stuck = shutil.rmtree, []

    def busy(path, **options):
        if "removed_step_000000001" in str(path) and len(stuck) < 2:
            stuck.append(path)
            raise OSError(39, "Directory not empty", str(path))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (1, 2, 3):
        saver.save(state(step))
        saver.settle()
        assert folder.steps() == [step]
    assert [e["event"] for e in events] == ["saved"] * 3 and "could not be removed" in caplog.text
    saver.save(state(4))
    saver.settle(last=True)
    assert len(stuck) == 2 and not list(folder.root.glob(".removed*"))


class Full:
    """A disk with room for so many bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return len(data)


@pytest.mark.parametrize("room", [0, 50, 200, 700, 3000])
def test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_called_so(room):
    """torch's writer says "unexpected pos" then."""
    with pytest.raises(OSError, match="No space left on device"):
        dcp._Sink(Full(room)).save(torch.zeros(1000))


def test_memory_is_that_which_the_job_may_have(tmp_path):
    free = psutil.virtual_memory().available
    job = tmp_path / "groups" / "slurm" / "job_7"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/slurm/job_7\n")
    ask = lambda: host_memory(tmp_path / "groups", tmp_path / "own")
    assert abs(ask() - free) < 1 << 30
    for folder, limit, used in ((job, "max", 5), (job.parent, "1000", 400)):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert ask() == 600
    (job / "memory.max").write_text("7")
    assert ask() == 2
    (job / "memory.max").write_text("3")
    assert ask() == 0
    (tmp_path / "own").unlink()
    assert abs(ask() - free) < 1 << 30


@pytest.mark.gpu1
def test_memory_that_cannot_be_locked_is_used_as_it_is(caplog):
    pieces = {"w": Pieces(torch.Size((1000,)), (((0,), torch.arange(1000.0, device="cuda")),))}
    room = module._HostRoom(pieces)
    memory = room._memory
    assert memory.is_locked
    assert int(torch.cuda.cudart().cudaHostRegister(memory.room.data_ptr(), memory.room.numel(), 0)) != 0  # a second time
    forget_cuda_error()
    assert float(torch.ones(4, device="cuda").sum()) == 4
    assert torch.equal(room.copy(pieces)["w"].parts[0][1], torch.arange(1000.0))
    room.close()


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 42 on elsewhere")
file.flush()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(folder, seconds):
    """Another process that holds the lock of a run's folder."""
    command = [sys.executable, "-c", HOLD, str(folder / ".lock"), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_two_runs_cannot_share_a_folder(tmp_path, mesh, caplog):
    holder = hold(tmp_path, 600)
    folder = CheckpointFolder(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"checkpoint.dir={tmp_path} is in use by process 42 on elsewhere: end that run"):
            folder.lock_if_there(patience=0.2)
    finally:
        holder.kill()
        holder.wait()
    folder.lock_if_there(patience=0.2)  # the lock of a killed process is none
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=f"process {os.getpid()} "):
        CheckpointFolder(tmp_path).make(patience=0.0)
    folder.unlock()
    other = CheckpointFolder(tmp_path)
    other.make(patience=0.0)
    other.unlock()


def test_a_lock_is_waited_for(tmp_path, mesh, caplog):
    """What was killed takes a while to end."""
    holder = hold(tmp_path, 0.5)
    folder = CheckpointFolder(tmp_path)
    folder.lock_if_there(patience=60)
    holder.wait()
    folder.unlock()
    assert "is in use by process 42 on elsewhere: waiting for its end" in caplog.text


def test_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    config = lambda **checkpoint: parse_config(CONFIG | {"checkpoint": {"dir": str(tmp_path / "a" / "b"), **checkpoint}})
    assert check_output(config(), 1, 1) > 0
    may = os.access  # a superuser is refused by a read-only file system alone, which a test cannot have everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and may(path, mode))
    with pytest.raises(ValueError, match=rf"checkpoint.dir={tmp_path}/a/b: {tmp_path} cannot be written \(read-only"):
        check_output(config(), 1, 1)
    monkeypatch.setattr(os, "access", may)
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match=rf"checkpoint.dir={tmp_path}/a/b: {tmp_path}/a is a file"):
        check_output(config(), 1, 1)


def test_a_copy_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    memory = psutil.virtual_memory().available
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 62))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = lambda **checkpoint: parse_config(CONFIG | {"checkpoint": {"dir": str(tmp_path), **checkpoint}})
    with pytest.raises(ValueError, match=r"checkpoint.asynchronous=true copies .* set checkpoint.asynchronous=false"):
        check_output(config(), 4 * memory, 4)
    check_output(config(), memory, 4)  # half of it on this machine
    check_output(config(asynchronous=False), 4 * memory, 4)
