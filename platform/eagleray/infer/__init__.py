"""Floor 2: how weights are used. No Ray, and no training."""
