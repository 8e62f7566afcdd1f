"""rCM: phases, random draws, losses, rollout and EMA (arXiv 2510.08431; method.md)."""
