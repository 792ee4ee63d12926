"""Learning from groups of samples: what a policy decides for one prompt or instance, compared with one another."""
