"""What the commands share; the scripts' functions need none of it. To copy a command, copy its script and this folder."""
