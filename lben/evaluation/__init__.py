"""What a trained model holds: accuracy, proofs, attacks, and their reports."""
