"""From one section of a config to one object."""
