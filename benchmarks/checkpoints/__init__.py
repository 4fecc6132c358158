"""FLUX checkpoints of random weights in the layout of the published repositories, for `benchmarks.make_checkpoint`."""
