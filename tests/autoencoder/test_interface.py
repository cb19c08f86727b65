"""The interface `FirstStage`: all autoencoders implement it."""

import torch

from autoencoder import Autoencoder, AutoencoderConfig, FirstStage, ImageEmbeddings, Pixels


def test_all_autoencoders_implement_the_interface():
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    embeddings = ImageEmbeddings.__new__(ImageEmbeddings)  # without an embedder, which needs a library
    for first_stage in (autoencoder, Pixels()):
        assert isinstance(first_stage, FirstStage)
    assert all(hasattr(type(embeddings), name) for name in vars(FirstStage) if not name.startswith("_"))
    assert not isinstance(torch.nn.Identity(), FirstStage)
