"""Networks and their losses, a family a file; three of them travel with saved models."""
