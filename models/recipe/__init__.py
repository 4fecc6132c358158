"""The recipe that trains models/flux-tiny from nothing: python -m models.recipe --help."""
