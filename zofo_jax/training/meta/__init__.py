"""Training on many tasks, and adapting to new ones from a few rows."""
