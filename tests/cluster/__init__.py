"""Tests on Ray; a package, so that the cluster and the service that they share end with its last test."""
