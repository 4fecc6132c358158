"""What runs on Ray: the Serve deployments, the coordinator, the ranks and their supervision."""
