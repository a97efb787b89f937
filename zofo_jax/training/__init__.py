"""The training loop, for one task and (in `meta`) for many."""
