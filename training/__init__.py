"""A run: set up, trained, evaluated, logged, saved and gone on with."""
