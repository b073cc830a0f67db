"""Records -> batches: numpy and Grain on the host, never jax."""
