"""What `benchmarks.serving` measures, with what, and how the figures are drawn."""
