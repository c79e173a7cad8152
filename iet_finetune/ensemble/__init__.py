"""Iterative ensemble training: clones are checked out, trained, collected and merged; checkpoints of it."""
