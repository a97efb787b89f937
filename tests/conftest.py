"""Settings of every test, made before any device is used."""

import jax

jax.config.update("jax_platforms", "cpu")
# Sharding is tested on one machine: eight devices in one process.
jax.config.update("jax_num_cpu_devices", 8)
# Broadcasting between different ranks is written out, or it is a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Comparisons see rounding of float32, never of a faster matrix product.
jax.config.update("jax_default_matmul_precision", "highest")
