"""Encoded images and captions, kept on disk for this run and others."""
