"""The ahead-of-time compiler: from the one form to a shared library without dependencies."""
