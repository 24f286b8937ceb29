"""Measurements on real models: loading, generation, perplexity, capture of heads, output error."""
