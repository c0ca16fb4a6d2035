"""Weight files: read safely, translated between layouts, compared with a model, loaded."""
