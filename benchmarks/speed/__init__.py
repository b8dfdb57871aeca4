"""How fast a training step and a whole run are."""
