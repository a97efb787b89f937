"""The method itself; imports jax, numpy and optax only."""
