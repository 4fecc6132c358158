"""The FLUX inference service; docs/architecture.md says what its rooms hold."""

import gc

# Python looks for unreachable cycles after each 700 new objects; while torch and diffusers are imported that took a
# fifth of the time in which a process starts, and so of the time in which a killed one is replaced.
gc.set_threshold(10_000, 10, 10)
