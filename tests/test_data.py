"""Virtual readers and the loader: the order of the samples, resuming, the thread, configurations that cannot work."""

import json
import threading
from itertools import chain, count

import psutil
import pytest
import torch
from shard_samples import (
    READERS,
    SEED,
    TEXT_DIM,
    TEXT_LEN,
    make_config,
    make_loader,
    make_model,
    make_sample,
    rcm_members,
    without,
    write_good,
    write_tar,
)

from rcm_mcore.data import RankReaders, deal_shards, expand_shards, merge_states

SIZES = (3, 1, 2, 4, 2, 3, 1, 2)  # samples per shard: unequal, so that readers are in different epochs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Folder with len(SIZES) shards; sample i stands in shard order."""
    folder, numbers = tmp_path_factory.mktemp("shards"), count()
    for shard, size in enumerate(SIZES):
        write_good(folder / f"shard_{shard:06d}.tar", [next(numbers) for _ in range(size)])
    return folder


def expected_keys(number, *, readers=READERS, seed=SEED):
    """Keys of the first samples of the run, by brute force over the definition."""
    starts = [sum(SIZES[:shard]) for shard in range(len(SIZES))]

    def reader_keys(reader):
        for epoch in count():
            for shard in deal_shards(len(SIZES), readers=readers, reader=reader, seed=seed, epoch=epoch):
                yield from (f"{starts[shard] + member:09d}" for member in range(SIZES[shard]))

    sources = [reader_keys(reader) for reader in range(readers)]
    return [next(sources[k % readers]) for k in range(number)]


def run_ranks(config, *, steps, size, batch=4, state=None, start_step=0):
    """All ranks of a run, one after the other: the keys in global order, and the whole state at the end."""
    slots, states = {}, []
    for rank in range(size):
        with make_loader(config, rank=rank, size=size, batch=batch, start_step=start_step) as loader:
            if state is not None:
                loader.load_state_dict(state)
            for step in range(start_step, start_step + steps):
                data = next(loader)
                assert data.step == step and len(data.slots) == batch // size
                slots.update({(step, slot): key for slot, key in zip(data.slots, data.keys, strict=True)})
            states.append(loader.state_dict())
    assert len(slots) == steps * batch, "two ranks read the same slot"
    return [slots[place] for place in sorted(slots)], merge_states(states)


# Order and resuming


@pytest.mark.parametrize(("batch", "size"), [(4, 1), (4, 2), (4, 4), (12, 4), (6, 2), (2, 2), (1, 1)])
def test_order_is_the_same_under_every_data_parallel_size(shards, batch, size):
    keys, state = run_ranks(make_config(shards), steps=48 // batch, size=size, batch=batch)
    assert keys == expected_keys(48)
    assert state["samples"] == 48 and set(state["readers"]) == set(range(READERS))


def test_a_loader_that_does_not_read_hands_out_the_same_slots(tmp_path):
    write_good(tmp_path / "shard_0.tar", range(4))
    config = make_config(tmp_path, readers=1)
    with make_loader(config) as reading, make_loader(config, reads=False) as other:
        batches = [next(reading) for _ in range(3)]
        (tmp_path / "shard_0.tar").unlink()  # what is not opened is not missed
        others = [next(other) for _ in range(3)]
    assert [(b.slots, b.step, b.state["samples"]) for b in others] == [(b.slots, b.step, b.state["samples"]) for b in batches]
    assert all(len(b.latents) == 4 for b in batches) and all(len(b.latents) == 0 for b in others)


def test_each_epoch_deals_every_shard_once_in_another_order():
    deals = [[deal_shards(9, readers=4, reader=v, seed=SEED, epoch=e) for v in range(4)] for e in range(3)]
    assert all(sorted(chain(*deal)) == list(range(9)) for deal in deals)
    assert all([len(part) for part in deal] == [3, 2, 2, 2] for deal in deals)
    assert deals[0] != deals[1] != deals[2]
    # Fixed for good: a checkpoint from another version must find the same order.
    assert deal_shards(8, readers=1, reader=0, seed=0, epoch=0) == [4, 2, 6, 0, 7, 5, 1, 3]
    assert deal_shards(8, readers=1, reader=0, seed=0, epoch=1) != deal_shards(8, readers=1, reader=0, seed=1, epoch=0)


def test_each_reader_reads_every_sample_of_its_deal_once_per_epoch(shards):
    config = make_config(shards, readers=1)
    keys, state = run_ranks(config, steps=3 * sum(SIZES), size=1, batch=1)
    epochs = [keys[start : start + sum(SIZES)] for start in range(0, len(keys), sum(SIZES))]
    assert all(sorted(epoch) == [f"{i:09d}" for i in range(sum(SIZES))] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert state["readers"][0][0] == 2  # epochs are counted from 0


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 4), (4, 2)])
def test_resumed_is_unbroken(shards, steps, before, after):
    config = make_config(shards)
    first, state = run_ranks(config, steps=steps, size=before)
    state = json.loads(json.dumps(state))
    second, _ = run_ranks(config, steps=6, size=after, state=state, start_step=steps)
    assert first + second == expected_keys(4 * (steps + 6))


def test_a_rank_resumes_from_its_own_state(shards):
    config = make_config(shards)
    with make_loader(config, rank=1, size=2) as loader:
        data = [next(loader) for _ in range(6)]
    with make_loader(config, rank=1, size=2) as loader:
        loader.load_state_dict(data[2].state)
        assert [next(loader).keys for _ in range(3)] == [batch.keys for batch in data[3:]]


def test_order_continues_when_the_global_batch_changes(shards):
    config = make_config(shards)
    first, state = run_ranks(config, steps=1, size=2, batch=6)
    second, _ = run_ranks(config, steps=5, size=4, batch=4, state=state, start_step=1)  # 6 is no multiple of 4
    assert first + second == expected_keys(26)


def test_resuming_reads_no_payload_of_what_was_passed(tmp_path):
    entries = [(f"{i:09d}", rcm_members(make_sample(i))) for i in range(4)]
    path = write_tar(tmp_path / "shard_000000.tar", entries)
    config = make_config(tmp_path, readers=1)
    with make_loader(config, batch=3) as loader:
        next(loader)
        state = loader.state_dict()
    broken = [(key, {name: bytes(len(data)) for name, data in members.items()}) for key, members in entries[:3]]
    write_tar(path, broken + entries[3:])
    with make_loader(config, batch=1) as loader:
        loader.load_state_dict(state)
        data = next(loader)
    assert data.keys == ("000000003",) and data.state["bad_samples"] == 0


def test_a_changed_set_of_shards_or_readers_is_refused(shards, tmp_path):
    _, state = run_ranks(make_config(shards), steps=1, size=1)
    for path in shards.iterdir():
        (tmp_path / path.name).symlink_to(path)
    make_loader(make_config(tmp_path)).load_state_dict(state)  # a folder may move
    for readers in (2, 8):
        with pytest.raises(ValueError, match=rf"data\.readers={readers} does not match .* 4 readers"):
            make_loader(make_config(tmp_path, readers=readers)).load_state_dict(state)
    write_good(tmp_path / "shard_000008.tar", [99])
    with pytest.raises(ValueError, match=r"data\.shards: .*differ"):
        make_loader(make_config(tmp_path)).load_state_dict(state)


# The loader's thread


def test_batch_holds_the_samples_in_float32(shards):
    with make_loader(make_config(shards)) as loader:
        data = next(loader)
    originals = [make_sample(int(key)) for key in data.keys]
    assert data.latents.dtype == data.text.dtype == torch.float32
    assert torch.equal(data.latents, torch.stack([sample.latent.float() for sample in originals]))
    assert data.text.shape == (4, TEXT_LEN, TEXT_DIM)
    for text, sample in zip(data.text, originals, strict=True):
        assert torch.equal(text[: len(sample.embed)], sample.embed.float())
        assert not text[len(sample.embed) :].any()
    assert data.prompts == tuple(sample.prompt for sample in originals)


def test_longer_latents_are_cut_to_the_first_frames(shards):
    with make_loader(make_config(shards, latent_shape=(2, 2, 2, 2))) as loader:
        data = next(loader)
    assert torch.equal(data.latents[0], make_sample(int(data.keys[0])).latent[:, :2].float())


def test_state_is_that_of_the_batch_consumed_not_of_those_prepared(shards):
    threads, ahead, too_far = set(), threading.Event(), threading.Event()

    def watch(batch):
        threads.add(threading.current_thread().name)
        if batch.step == 4:
            ahead.set()
        if batch.step == 5:
            too_far.set()
        return batch

    with make_loader(make_config(shards, prefetch=3), transform=watch) as loader:
        start = loader.state_dict()
        assert start["samples"] == 0
        next(loader)
        data = next(loader)
        assert ahead.wait(timeout=10), "nothing is prepared ahead"
        assert not too_far.wait(timeout=0.2), "with two consumed and three ready the thread must wait"
        state = loader.state_dict()
    assert state == data.state and state["samples"] == 8
    assert threads == {"data-loader"}
    with make_loader(make_config(shards, prefetch=1)) as loader:
        assert loader.state_dict() == start
        assert [next(loader).state, next(loader).state][1] == state


def open_shards(folder):
    return [file.path for file in psutil.Process().open_files() if file.path.startswith(str(folder))]


def test_a_reader_has_one_shard_open_at_most(shards):
    readers = RankReaders(make_config(shards), model=make_model(), seed=SEED, dp_rank=0, dp_size=1)
    for k in range(2 * sum(SIZES)):
        readers.read(k)
        assert len(open_shards(shards)) == min(k + 1, READERS)
    readers.close()
    assert not open_shards(shards)


def test_closing_stops_a_waiting_thread_and_closes_the_shards(shards):
    with make_loader(make_config(shards)) as loader:
        next(loader)
        assert open_shards(shards)
    assert not open_shards(shards)
    assert not any(thread.name == "data-loader" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    with make_loader(make_config(shards)):  # never iterated over
        pass


def test_an_error_in_the_thread_is_raised_at_its_batch(shards):
    def fail(batch):
        if batch.step == 2:
            raise FloatingPointError("no noise today")
        return batch.step

    with make_loader(make_config(shards), transform=fail) as loader:
        assert next(loader) == 0
        for thread in threading.enumerate():
            if thread.name == "data-loader":
                thread.join(timeout=10)  # it has failed; the batch before is still to be had
        assert next(loader) == 1
        for _ in range(2):
            with pytest.raises(FloatingPointError, match="no noise today"):
                next(loader)


def test_a_position_cannot_be_loaded_into_a_running_loader(shards):
    with make_loader(make_config(shards)) as loader:
        next(loader)
        with pytest.raises(AssertionError, match="before the first batch"):
            loader.load_state_dict(loader.state_dict())


# What a user can get wrong


def test_configurations_that_cannot_work_are_refused(shards):
    refused = [
        ({"shards": (f"{shards}/shard_9*.tar",)}, {}, r"data\.shards: '.*shard_9.*' matches no file"),
        ({"shards": (f"{shards}/shard_{{000006..000008}}.tar",)}, {}, r"shard_000008\.tar' \(of .*\) matches no file"),
        ({"shards": (str(shards),)}, {}, r"it is a folder: write .*/shard_\*\.tar"),
        ({"readers": 16}, {}, r"data\.readers=16 .* only 8 shards.* at most 8"),
        ({"readers": 6}, {"size": 4}, r"data\.readers=6 is not divisible by the data-parallel size 4"),
        ({}, {"size": 4, "batch": 6}, r"train\.global_batch_size=6 is not divisible by the data-parallel size 4"),
    ]
    for fields, arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            make_loader(make_config(shards, **fields), **arguments)


def test_patterns_expand_to_each_file_once_by_base_name(shards, tmp_path):
    names = [f"shard_{i:06d}.tar" for i in range(8)]
    expanded = expand_shards([f"{shards}/shard_*{{3,5}}.tar", f"{shards}/shard_{{000000..000007}}.tar"])
    assert expanded == [f"{shards}/{name}" for name in names]
    other = write_good(tmp_path / "shard_000003a.tar", [0])
    assert expand_shards([f"{shards}/*.tar", str(other)])[3:5] == [f"{shards}/shard_000003.tar", str(other)]


def test_bad_counts_survive_a_change_of_the_data_parallel_size(tmp_path):
    for shard in range(4):
        bad = [(f"{shard}0{i}", without(rcm_members(make_sample(0)), "latent.pt")) for i in range(shard)]
        write_tar(tmp_path / f"shard_{shard:06d}.tar", [*bad, (f"{shard}09", rcm_members(make_sample(1)))])
    config = make_config(tmp_path)
    _, state = run_ranks(config, steps=2, size=4)
    assert state["bad_samples"] == 2 * (0 + 1 + 2 + 3)
    for size in (1, 2):
        assert run_ranks(config, steps=1, size=size, state=state, start_step=2)[1]["bad_samples"] == 18
