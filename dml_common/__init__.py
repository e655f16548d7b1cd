"""What the commands share; the scripts' functions need none of it. To copy a command: its script and this folder."""
