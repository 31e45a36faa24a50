"""What a plan will cost: measured segment times, simulation, prediction, and the page that shows it."""
