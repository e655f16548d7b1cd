"""What the commands share; no function of a script needs it. To copy a command, copy its script and this."""
