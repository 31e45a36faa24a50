"""What runs on a device: its part of the plan, opened, computed, and served to others."""
