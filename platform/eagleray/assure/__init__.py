"""Floor 2: how results are judged."""
