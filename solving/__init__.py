"""From a trained agent and instances to tours."""
