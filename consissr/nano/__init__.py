"""What only the bundled models need."""
