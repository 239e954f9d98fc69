"""Floor 0: what every floor needs and what knows no images, no torch and no Ray."""
