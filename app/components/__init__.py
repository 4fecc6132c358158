"""The models beside the transformer: text encoders and VAE."""
