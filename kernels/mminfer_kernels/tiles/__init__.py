"""What the Triton kernels of attention share: which keys a row sees, and loading of tiles."""
