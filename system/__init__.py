"""Files and terminals, handled with care."""
