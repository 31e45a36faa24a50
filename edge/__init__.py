"""One model on several devices: plan, split, worker, coordinator."""
