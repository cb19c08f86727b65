"""Fast arithmetic for layers that `autoencoder` and `ldm` share: it knows no model."""
