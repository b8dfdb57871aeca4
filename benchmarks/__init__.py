"""Measuring and what is only measured with. Not part of the installed package."""
