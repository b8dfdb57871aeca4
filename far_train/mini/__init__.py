"""The embedded default: a small world of sprites, and the small models that are trained on it."""
