"""The coordinator: sends requests to the devices, repeats and reroutes them, and watches over the workers."""
