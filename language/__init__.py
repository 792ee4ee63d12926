"""Language models: prompts with their answers, what a completion earns, and the packages that models come from."""
