"""idc: a modular experiment kit for multi-subject video generation."""

__version__ = "0.1.0"
