"""The base model: loading, adapters, attention maps, weights files, sampling."""
