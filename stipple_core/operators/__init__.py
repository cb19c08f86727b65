"""Fast convolution and normalization for the layers of `autoencoder` and `ldm`."""
