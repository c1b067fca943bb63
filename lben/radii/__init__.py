"""From logits, their error and a proved bound to radii within which a prediction cannot change."""
