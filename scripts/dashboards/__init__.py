"""Grafana dashboards as code. `panels` says what a panel is, `service` and `magcache` have them, `build` makes JSON."""
