"""Settings: configs as files and command lines give them, and the sections that check what they hold."""
