"""What this machine needs to serve, looked at for real: `turboserve doctor`."""
