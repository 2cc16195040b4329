"""Usage records, kept until they are delivered."""
