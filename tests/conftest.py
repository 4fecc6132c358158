"""Settings of the whole test run; they stand here because they must be in force before anything is imported."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# No test needs the network: the model ships with the repository.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
