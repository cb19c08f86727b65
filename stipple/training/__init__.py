"""The machinery around training steps, independent of the models that are trained."""
