"""Suites of environments that others publish scores of: one room each, and which task is of which."""
