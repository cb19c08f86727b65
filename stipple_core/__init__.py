"""What all other packages build on: configs, files, images, training data, the latent cache, and fast operators.

    config, typed_values   dataclasses from YAML files and overrides
    prompt_files, nearest  prompts in files; "did you mean"
    randomness             a generator for each draw
    files                  weights, checkpoints, JSON, atomic writes
    images                 decoding, cropping, PNG files with metadata
    data                   captioned images from folders, tar shards and datasets, in training order
    latent_cache           posterior moments and contexts, computed once
    embedders              frozen CLIP models
    operators              convolution and normalization layers

This package imports nothing itself, so that `stipple_core.config` can be imported without torch.
"""
