"""Measurements of public functions; see README.md for the method."""
