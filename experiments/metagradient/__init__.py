"""What takes the gradient of a whole training run: a rate per step, a weight per document, points that teach."""
