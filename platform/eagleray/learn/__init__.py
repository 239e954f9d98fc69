"""Floor 2: how weights change."""
