"""What lets a training run be stopped, killed, resumed exactly, and asked what went wrong."""
