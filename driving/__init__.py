"""Driving: traffic on real maps as logs, what a driver sees in it, and what can be driven next.

Maps and demand are real, drivers are SUMO's: simulated. All but `simulator` runs without SUMO, on logs from anywhere.
"""
