"""What the processes of a fleet know of each other, through Redis."""
