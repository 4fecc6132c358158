"""Every decision about requests: which run, when, with which schedule. Pure: no Ray, no web, no model."""
