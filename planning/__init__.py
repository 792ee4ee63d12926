"""Solvers inside the learnt model: what moves cost as it knows them, and the tours that are best by that."""
