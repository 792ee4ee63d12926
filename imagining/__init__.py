"""World models, imagination in them, and the behaviour that is learnt there."""
