"""Environments. Importing this package registers `TSP-v0` with gymnasium."""

import gymnasium

gymnasium.register(id="TSP-v0", entry_point="envs.routing:TSPEnv")
