"""A trajectory planner that imitates: encoders of a scene, a decoder of candidates, losses, metrics, batches."""
