"""One rank's work on tensors: load a shard, run step plans. Imports neither Ray nor the web."""
