"""Floor 3: a Report becomes one self-contained HTML page."""
