"""One rank's work on tensors: load a shard, run one step plan. Knows neither Ray nor the web."""
