"""A run from load to save."""
