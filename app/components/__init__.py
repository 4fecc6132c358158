"""The models beside the transformer: the text encoders and the VAE."""
