"""What surrounds a training step; knows no model."""
