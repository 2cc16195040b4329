"""The bytes of an answer, moved to the client."""
