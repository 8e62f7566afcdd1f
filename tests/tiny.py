"""A run small enough for tests: random shards, a tiny network, and its configuration as a dictionary."""

import json

import torch
import yaml

from rcm_mcore.data import Sample, write_shards

MODEL = {
    "size": "tiny", "num_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "ffn_hidden_size": 64, "in_channels": 4,
    "freq_dim": 16, "text_dim": 8, "text_len": 5, "dtype": "float32", "recompute": "none",
}  # fmt: skip
# Networks told of more than a text, as changes of MODEL.
VARIANTS = {
    "first_last": {"condition": "first_last", "image_dim": 6, "image_len": 3},
    "frames": {"family": "cosmos", "condition": "frames", "adaln_rank": 8},
}
LATENT = [4, 2, 4, 4]


def make_shards(folder, samples=48, per_shard=4, seed=0):
    """Shards of random latents whose mean depends on the prompt."""
    g = torch.Generator().manual_seed(seed)

    def sample(i):
        return Sample(
            latent=0.5 * torch.randn(LATENT, generator=g) + (i % 2) - 0.5,
            embed=torch.randn(2 + i % 3, MODEL["text_dim"], generator=g),
            prompt=f"sample {i}",
            given=torch.randn(LATENT, generator=g),
            image=torch.randn(6, 6, generator=g),
        )

    write_shards((sample(i) for i in range(samples)), folder, samples_per_shard=per_shard)
    return folder


def config(shards, folder, objective="pretrain", **sections):
    """A configuration tree; `sections` are merged into it."""
    tree = {
        "model": dict(MODEL),
        "mesh": {},
        "train": {"objective": objective, "steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
        "data": {"shards": [f"{shards}/*.tar"], "latent_shape": LATENT, "readers": 4},
        # A large eps: with beta1 = 0 a first step is the sign of the gradient, and rounding would decide it.
        "optim": {"lr": 1e-2, "fake_score_lr": 1e-2, "eps": 1.0, "warmup_steps": 0, "beta2": 0.99},
        "checkpoint": {"dir": str(folder), "every": 100},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return tree


def write_config(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


def train_all(folder, configs):
    """Train configurations {(world size, name): tree} with checkpoints under folder/name, one launch per world size."""
    import launch

    for world_size in sorted({w for w, _ in configs}):
        paths = []
        for (w, name), tree in configs.items():
            if w == world_size:
                tree["checkpoint"]["dir"] = str(folder / name)
                paths.append(str(write_config(folder / f"{name}.yaml", tree)))
        (folder / f"world_{world_size}.txt").write_text("\n".join(paths))
        launch.run_ranks(world_size, "ranks_train.py", folder)


def all_tensors(checkpoint):
    """Every tensor of a checkpoint by key: weights, masters, second moments, EMA."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    stored = {k: e for k, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    tensors = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in stored.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return tensors


def differences(a, b):
    """Relative difference of every tensor of two checkpoints; NaN counts as a difference."""
    a, b = all_tensors(a), all_tensors(b)
    assert a.keys() == b.keys() and len(a) > 100
    return {k: float((a[k] - b[k]).double().norm() / b[k].double().norm().clamp_min(1e-12)) for k in b}


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# What no two runs share.
MEASURED = {
    "seconds", "data_seconds", "forward_backward_seconds", "optimizer_seconds", "save_seconds", "samples_per_second",
    "tokens_per_second", "tflops_per_rank", "mfu", "memory_gib",
}  # fmt: skip


def metrics(folder):
    """The lines of the log without times and memory."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in log_lines(folder)]


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
