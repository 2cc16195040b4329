"""What a request's body asks."""
