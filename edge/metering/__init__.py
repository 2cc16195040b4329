"""What an answer used."""
