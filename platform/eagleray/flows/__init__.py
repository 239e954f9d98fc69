"""Floor 4: the only importers of Ray. A flow decides where and when, never what."""
