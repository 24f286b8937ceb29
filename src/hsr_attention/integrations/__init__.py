"""Where other frameworks join: the only part that imports torch and transformers."""
