"""Real streets: what OpenStreetMap says of roads, the network that they make, and how long driving takes in it."""
