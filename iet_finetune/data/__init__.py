"""Data sets, captions, transforms and the loader; import the modules, this file is empty."""
