"""Tiny samples and shards for tests of rcm_mcore.data; tars are written by webdataset, not by us."""

import io

import safetensors.torch
import torch
from webdataset.writer import TarWriter

from rcm_mcore.config import DataConfig, parse_model
from rcm_mcore.data import DataLoader, Sample, pad_text

SHAPE = (2, 3, 2, 2)  # C F H W
TEXT_LEN, TEXT_DIM = 5, 4
READERS = 4
SEED = 7


def make_sample(index, *, shape=SHAPE, rows=None, width=TEXT_DIM, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(index)
    rows = 1 + index % TEXT_LEN if rows is None else rows
    latent = torch.randn(shape, generator=generator).to(dtype)
    return Sample(latent, torch.randn(rows, width, generator=generator).to(dtype), f"prompt {index} é", f"{index:09d}")


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def rcm_members(sample):
    embed = pad_text(sample.embed, max(8, len(sample.embed)))  # zero rows past the prompt
    return {"latent.pt": saved(sample.latent), "embed.pt": saved(embed), "prompt.txt": sample.prompt.encode()}


def own_members(sample):
    tensors = {name: getattr(sample, name) for name in ("latent", "embed", "given", "image")}
    tensors = safetensors.torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None})
    return {"tensors.safetensors": tensors, "prompt.txt": sample.prompt.encode()}


def write_tar(path, entries, *, as_folders=False):
    """Entries (key, {extension: bytes}) through webdataset's writer; as_folders names members key/key.extension."""
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for key, members in entries:
            tar.write({"__key__": f"{key}/{key}" if as_folders else key, **members})
    return path


def write_good(path, indices):
    return write_tar(path, [(f"{i:09d}", rcm_members(make_sample(i))) for i in indices])


def without(members, extension):
    return {name: data for name, data in members.items() if name != extension}


def make_config(folder, **fields):
    defaults = {"shards": (f"{folder}/shard_*.tar",), "latent_shape": SHAPE, "readers": READERS}
    return DataConfig(**{**defaults, **fields})


def make_model(**fields):
    return parse_model({"size": "tiny", "text_len": TEXT_LEN, "text_dim": TEXT_DIM, **fields})


def make_loader(config, *, rank=0, size=1, batch=4, **arguments):
    arguments = {"model": make_model(), "seed": SEED, **arguments}
    return DataLoader(config=config, global_batch_size=batch, dp_rank=rank, dp_size=size, **arguments)
