"""Environments. Importing this package registers with gymnasium those of routing and the small tasks of `examples`."""

import gymnasium

gymnasium.register(id="TSP-v0", entry_point="envs.routing:TSPEnv")
gymnasium.register(id="ATSP-v0", entry_point="envs.routing:ATSPEnv")
gymnasium.register(id="CVRP-v0", entry_point="envs.routing:CVRPEnv")
gymnasium.register(id="VRPTW-v0", entry_point="envs.routing:VRPTWEnv")
gymnasium.register(id="Pickup-v0", entry_point="envs.routing:PickupEnv")

gymnasium.register(id="TMaze-v0", entry_point="envs.examples:TMazeEnv")
gymnasium.register(id="PixelGrid-v0", entry_point="envs.examples:PixelGridEnv")
gymnasium.register(id="Switches-v0", entry_point="envs.examples:SwitchesEnv")
gymnasium.register(id="SwitchesNoRules-v0", entry_point="envs.examples:SwitchesEnv", kwargs={"rules": False})
gymnasium.register(id="DeepSea-v0", entry_point="envs.deep_sea:DeepSeaEnv")
gymnasium.register(id="Longitudinal-v0", entry_point="envs.longitudinal:LongitudinalEnv")
gymnasium.register(id="LongitudinalPlan-v0", entry_point="envs.longitudinal:LongitudinalEnv", kwargs={"horizon": 10})
gymnasium.register(id="Drive-v0", entry_point="envs.driving:DriveEnv")
