"""What a run needs before it starts: its programs compiled ahead of time, from abstract arrays."""
