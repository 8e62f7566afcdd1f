"""Mistakes that were easy to make, each with the test that must notice (run by mutate.py)."""

import mutations_data
import mutations_fp8
import mutations_memory
import mutations_networks
import mutations_runs
from mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

_FILES = (mutations_networks, mutations_data, mutations_memory, mutations_fp8, mutations_runs)
MUTATIONS = [mutation for file in _FILES for mutation in file.MUTATIONS]
