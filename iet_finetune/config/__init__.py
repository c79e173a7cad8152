"""A run's settings: dataclasses whose fields are the flags and the keys of YAML files; imports no torch."""

from .config import Config as Config
