"""Training: where a run starts, its state and step, objectives, optimizers, speed, and the loop."""
