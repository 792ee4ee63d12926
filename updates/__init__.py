"""From losses to applied gradients: optimisers, and what keeps them finite."""
