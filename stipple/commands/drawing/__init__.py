"""What the drawing commands share: flags, the opened model, and the pictures that are written."""
