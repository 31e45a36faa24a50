"""What travels between coordinator and workers, and how."""
