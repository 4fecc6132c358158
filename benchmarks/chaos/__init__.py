"""Processes of a running service are killed and stopped under load, and what clients see of it is counted."""
