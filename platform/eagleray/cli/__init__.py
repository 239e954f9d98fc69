"""Floor 5: the verbs of the ``eagleray`` command."""
