"""From photos to a dataset: subjects, masks, composites, captions."""
