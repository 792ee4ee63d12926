"""What soft actor-critic is made of."""
