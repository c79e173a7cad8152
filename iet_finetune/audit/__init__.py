"""Measuring how much a finished pipeline repeats its training images, and how good its pictures are."""
