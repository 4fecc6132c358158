"""The service's only web code: routes, schemas and errors. It knows no Ray; a ``Backend`` does the work."""
