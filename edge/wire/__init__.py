"""Between processes: who is who (certificates), what a message holds, and connections."""
