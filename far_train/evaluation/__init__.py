"""What was learned, measured and shown."""
