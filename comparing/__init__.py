"""Finished and running logdirs side by side."""
