"""The stages of training: their configs, networks, data, objectives and validation.

The training loops are in `stipple.commands`; this package has what they are assembled from.
"""
