"""MagCache for diffusion transformers: decide ahead which denoising steps compute and which reuse.

The magnitude-ratio rule of MagCache (Ma et al., arXiv 2506.09045), a planner, calibration and hooks. Needs torch; the
hooks and the strategies work on diffusers' models.
"""

from magcache_core.choice import choose
from magcache_core.config import ConfigError, MagCacheConfig
from magcache_core.correct import VELOCITY_MODES, evenly_corrected, velocity_steps
from magcache_core.hooks import apply_mag_cache, remove_mag_cache
from magcache_core.plan_data import Plan, Trial, VelocityStep
from magcache_core.planner import evenly_spaced, fewest_steps, fill, plan
from magcache_core.profile_data import BranchCurve, Profile, ProfileError, write_profile
from magcache_core.profile_store import (
    load_profile,
    pick_profile,
    profile_names,
    save_profile,
    stored_profiles,
    was_measured_for,
)
from magcache_core.reuse import REUSE_MODES, decisions, reuse_weights
from magcache_core.state import Decision, MagCacheState, predicted_error, schedule
from magcache_core.strategies import (
    BlockMetadata,
    MagCacheStrategy,
    ResidualError,
    get_strategy,
    register_strategy,
    registered_strategies,
)

__all__ = [
    "REUSE_MODES",
    "VELOCITY_MODES",
    "BlockMetadata",
    "BranchCurve",
    "ConfigError",
    "Decision",
    "MagCacheConfig",
    "MagCacheState",
    "MagCacheStrategy",
    "Plan",
    "Profile",
    "ProfileError",
    "ResidualError",
    "Trial",
    "VelocityStep",
    "apply_mag_cache",
    "choose",
    "decisions",
    "evenly_corrected",
    "evenly_spaced",
    "fewest_steps",
    "fill",
    "get_strategy",
    "load_profile",
    "pick_profile",
    "plan",
    "predicted_error",
    "profile_names",
    "register_strategy",
    "registered_strategies",
    "remove_mag_cache",
    "reuse_weights",
    "save_profile",
    "schedule",
    "stored_profiles",
    "velocity_steps",
    "was_measured_for",
    "write_profile",
]
