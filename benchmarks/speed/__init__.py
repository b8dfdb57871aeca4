"""The speed benchmark: a training step next to Custom Diffusion's, and the phases of a whole run."""
