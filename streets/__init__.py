"""Real streets: what OpenStreetMap and SUMO say of roads, the network that they make, and how long driving takes."""
