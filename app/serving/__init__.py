"""The only Ray code: deployments, the coordinator, the ranks and their supervision."""
