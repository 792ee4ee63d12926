"""The parts that networks are built of, and actors and critics themselves."""
