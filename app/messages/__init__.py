"""Messages between the API, the coordinator and the ranks: frozen plain data."""
