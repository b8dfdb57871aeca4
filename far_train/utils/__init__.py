"""Files, errors, settings and devices; imports no other wing."""
