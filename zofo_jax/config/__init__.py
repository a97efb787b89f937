"""The fields of a run: defaults, checks, presets, config files."""

from zofo_jax.config.defaults import base_config as base_config
from zofo_jax.config.files import choose as choose
from zofo_jax.config.files import parse_arg as parse_arg
from zofo_jax.config.presets import apply_preset as apply_preset
from zofo_jax.config.validate import check as check
