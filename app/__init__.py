"""The FLUX inference service: engine (tensors), serving (Ray), api (HTTP)."""
