"""Checkpoints, their checksums, and the ledger of outer steps."""
