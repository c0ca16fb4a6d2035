"""Configuration of a run: a typed schema, and YAML files that are read into it."""
