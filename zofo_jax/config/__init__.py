"""The fields of a run: defaults, checks, presets."""

from zofo_jax.config.defaults import apply_preset as apply_preset
from zofo_jax.config.defaults import base_config as base_config
from zofo_jax.config.validate import check as check
