"""Frames to what viewers receive: imported by the gateway and by workers that share no memory with it."""
