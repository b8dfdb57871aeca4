"""The training recipe and what it keeps on disk."""
