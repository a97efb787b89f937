"""Rows of files and of the hub, encoded into batches."""
