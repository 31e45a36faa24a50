"""Workers that a Ray cluster places and starts."""
