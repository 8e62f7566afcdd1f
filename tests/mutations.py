"""Mistakes that were easy to make, each with the test that must notice (run by mutate.py)."""

import mutations_data
import mutations_networks
import mutations_precision
import mutations_runs
from mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = [
    *mutations_networks.MUTATIONS,
    *mutations_precision.MUTATIONS,
    *mutations_data.MUTATIONS,
    *mutations_runs.MUTATIONS,
]
