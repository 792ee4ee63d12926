"""Sweeps: which runs they have, who runs them, and what they are searched by."""
