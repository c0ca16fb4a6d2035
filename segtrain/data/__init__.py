"""Data sets: adapters, loaders and the synthetic scenes."""
