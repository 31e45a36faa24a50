"""plan.json: what a plan says, the devices that it is for, and how it is put into words. Needs no other part of edge/."""
