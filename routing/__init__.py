"""Routing problems: rules, costs, instances, files, solutions and pictures."""
