"""From shards of cached latents and text embeddings to the batches of a data-parallel rank."""

from rcm_mcore.data.embedding import load_embedding
from rcm_mcore.data.inspection import ShardReport, inspect_shard
from rcm_mcore.data.loader import Batch, DataLoader, DataStalled
from rcm_mcore.data.readers import RankReaders, VirtualReader, deal_shards, expand_shards, merge_states, shards_digest
from rcm_mcore.data.shards import BadSample, DamagedShard, Sample, Shard, fit_sample, pad_text, write_shards
from rcm_mcore.data.workers import ReaderDied

__all__ = [
    "BadSample",
    "Batch",
    "DamagedShard",
    "DataLoader",
    "DataStalled",
    "RankReaders",
    "ReaderDied",
    "Sample",
    "Shard",
    "ShardReport",
    "VirtualReader",
    "deal_shards",
    "expand_shards",
    "fit_sample",
    "inspect_shard",
    "load_embedding",
    "merge_states",
    "pad_text",
    "shards_digest",
    "write_shards",
]
