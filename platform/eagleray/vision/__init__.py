"""Floor 1: bytes to pixels, sources to corpora, foreign weights to bundles. No Ray."""
