"""From logs of traffic to samples: scenarios, which of them are taken, what is computed of each, where it is kept."""
