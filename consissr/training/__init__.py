"""Training: one loop, and one small file per stage that says what is trained and by which loss."""
